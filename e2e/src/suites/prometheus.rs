//! What `config/observability` offers Prometheus, read by a real one: once with native histograms, once with the classic
//! buckets.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::namespace::TestNamespace;
use super::{Skip, Test};
use crate::cluster::Cluster;
use crate::host;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("promtool accepts the rules, and each alert fires when it is to and not otherwise", rules_are_valid),
    ("Prometheus answers every rule, alert and panel, with native and with classic histograms", answers),
];

/// The package that contains both programs.
const PROGRAMS: &[(&str, &str)] = &[("prometheus", "prometheus"), ("promtool", "prometheus")];
/// The tests that promtool runs of the rules, in this repository.
const RULE_TESTS: &str = "e2e/src/suites/prometheus/rules-test.yaml";
/// Where the meshed pods are.
const NAMESPACE: &str = "t-prometheus";

/// What Flagger's built-in checks and the documentation of Argo Rollouts ask for, about Istio's metrics.
const ISTIO: [&str; 3] = [
    r#"100 * sum(rate(istio_requests_total{reporter="destination", destination_workload_namespace="t-prometheus", destination_workload=~"front", response_code!~"5.*"}[1m])) / sum(rate(istio_requests_total{reporter="destination", destination_workload_namespace="t-prometheus", destination_workload=~"front"}[1m]))"#,
    r#"histogram_quantile(0.99, sum by (le) (rate(istio_request_duration_milliseconds_bucket{reporter="destination", destination_workload_namespace="t-prometheus", destination_workload=~"front"}[1m])))"#,
    r#"sum(irate(istio_requests_total{reporter="source", destination_service=~"back.t-prometheus.svc.cluster.local", response_code!~"5.*"}[5m])) / sum(irate(istio_requests_total{reporter="source", destination_service=~"back.t-prometheus.svc.cluster.local"}[5m]))"#,
];

/// Installs Prometheus.
pub(super) fn prepare() -> Result<()> {
    host::install_packages(PROGRAMS)
}

fn rules_are_valid(_: &Kube) -> Result<()> {
    prepare()?;
    let rules = file("rules.yaml");
    host::output(Command::new("promtool").args(["check", "rules"]).arg(rules))?;
    let test = host::workspace().join(RULE_TESTS);
    host::output(Command::new("promtool").args(["test", "rules"]).arg(test))?;
    stalled_line_is_the_alert()
}

/// The panel of Canaries that do not change has its line where the alert begins, for the same phases.
fn stalled_line_is_the_alert() -> Result<()> {
    let rules = rules()?;
    let alert = rules.iter().find(|rule| rule["alert"] == "TulleCanaryStalled").context("no such alert")?;
    let alert = alert["expr"].as_str().unwrap_or("");
    let dashboard = dashboard("canaries")?;
    let mut panels = dashboard["panels"].as_array().into_iter().flatten();
    let panel = panels
        .find(|panel| panel["fieldConfig"]["defaults"]["thresholds"].is_object())
        .context("no panel of the Canaries has a line")?;
    let line = &panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"];
    ensure!(
        alert.ends_with(&format!(" > {line}")),
        "the panel has its line at {line} s, the alert is {alert}"
    );
    let phases = alert.split("phase=~").nth(1).and_then(|rest| rest.split('}').next());
    let phases = phases.context("the alert is of no phase")?;
    let shown = panel["targets"][0]["expr"].as_str().unwrap_or("");
    ensure!(shown.contains(phases), "the alert is of {phases}, the panel shows {shown}");
    Ok(())
}

fn answers(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else { bail!(Skip("Prometheus runs on the node")) };
    prepare()?;
    let field = TestNamespace::meshed(kube, NAMESPACE)?;
    field.injects()?;
    field.service("back", 1, &["--errors=20"])?;
    field.service("front", 1, &["--next=back:80"])?;
    field.load("load", "front:80", 40)?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "lost"},
        "spec": {"target": {"kind": "Deployment", "name": "nobody"}, "steps": [{"weight": 50, "hold": "5s"}]}}))?;

    let pods = pods(kube)?;
    let native = Prometheus::start(cluster, &pods, true, 19_090)?;
    let classic = Prometheus::start(cluster, &pods, false, 19_091)?;
    for prometheus in [&native, &classic] {
        let questions = questions(prometheus.native)?;
        kube.wait_for("Prometheus to answer every rule and panel", 150, || {
            let wrong: Vec<String> = questions
                .iter()
                .filter_map(|question| prometheus.wrong(question).err())
                .map(|e| format!("{e:#}"))
                .collect();
            if wrong.is_empty() { Ok(true) } else { Err(anyhow!(wrong.join("\n"))) }
        })?;
        // The rules of one workload may have been recorded before those of another.
        kube.wait_for("the alert to be true", 60, || {
            prometheus.fires("TulleWorkloadFailing", "back").map(|()| true)
        })?;
    }
    let one = "count(tulle_request_duration_seconds)";
    let buckets = "count(tulle_request_duration_seconds_bucket)";
    ensure!(!native.query(one)?.is_empty(), "there are no native histograms");
    ensure!(native.query(buckets)?.is_empty(), "a histogram is more than one series");
    ensure!(!classic.query(buckets)?.is_empty(), "there are no classic buckets");
    let p99 = "histogram_quantile(0.99, sum(rate(tulle_request_duration_seconds[1m])))";
    let seconds: f64 = native.query(p99)?.first().and_then(value).context("no p99")?;
    ensure!(seconds > 0.0 && seconds < 30.0, "p99 is {seconds} s");
    Ok(())
}

/// What stands for the variables of the dashboards.
const VARIABLES: [(&str, &str); 4] =
    [("$__rate_interval", "1m"), ("$namespace", NAMESPACE), ("$workload", "front"), ("$service", "back")];

/// An expression, and whether it must have a result.
struct Question {
    of: String,
    expression: String,
    needs_data: bool,
}

/// All expressions of the folder.
fn questions(native: bool) -> Result<Vec<Question>> {
    let mut all = Vec::new();
    for rule in rules()? {
        let of = rule["record"].as_str().or(rule["alert"].as_str()).unwrap_or("").to_owned();
        let expression = rule["expr"].as_str().unwrap_or("").to_owned();
        all.push(Question { of, expression, needs_data: rule["record"].is_string() });
    }
    let dashboards = ["mesh", "workload", "canaries"];
    for name in dashboards {
        let dashboard = dashboard(name)?;
        for variable in dashboard["templating"]["list"].as_array().into_iter().flatten() {
            if let Some(query) = variable["query"]["query"].as_str() {
                let of = format!("{name}: the values of {}", variable["name"]);
                let expression = filled(asked_by(query)?, &VARIABLES);
                all.push(Question { of, expression, needs_data: true });
            }
        }
        for panel in dashboard["panels"].as_array().into_iter().flatten() {
            // A panel that may be empty says what that means.
            let may_be_empty = panel["fieldConfig"]["defaults"]["noValue"].is_string();
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expression = filled(target["expr"].as_str().unwrap_or(""), &VARIABLES);
                // The test has a Canary.
                let needs_data = !may_be_empty || expression.contains("tulle_canary_");
                all.push(Question { of: format!("{name}: {}", panel["title"]), expression, needs_data });
            }
        }
    }
    let arguments = [
        ("{{ namespace }}", NAMESPACE),
        ("{{ target }}", "front"),
        ("{{ interval }}", "1m"),
        ("{{args.namespace}}", NAMESPACE),
        ("{{args.rollout}}", "front"),
        ("{{args.hash}}", "[a-z0-9]+"),
    ];
    for name in ["flagger.yaml", "argo-rollouts.yaml"] {
        for object in documents(&fs::read_to_string(file(name))?)? {
            let metrics = object["spec"]["metrics"].as_array().into_iter().flatten();
            let of_metrics = metrics.map(|metric| &metric["provider"]["prometheus"]["query"]);
            for query in of_metrics.chain([&object["spec"]["query"]]).filter_map(Value::as_str) {
                let expression = filled(query, &arguments);
                all.push(Question { of: name.to_owned(), expression, needs_data: true });
            }
        }
    }
    // Milliseconds exist in classic buckets only.
    let istio = ISTIO.into_iter().filter(|_| !native);
    all.extend(istio.map(|expression| Question {
        of: "Istio's names".to_owned(),
        expression: expression.to_owned(),
        needs_data: true,
    }));
    ensure!(all.iter().all(|question| !question.expression.is_empty()), "a question is empty");
    let kinds: BTreeSet<bool> = all.iter().map(|question| question.needs_data).collect();
    ensure!(kinds.len() == 2 && all.len() > 70, "only {} expressions were found", all.len());
    Ok(all)
}

/// What a dashboard's variable asks Prometheus for: `label_values(series, label)` and `query_result(expression)` are
/// functions of Grafana.
fn asked_by(query: &str) -> Result<&str> {
    let within = |function: &str| query.strip_prefix(function)?.strip_prefix('(')?.strip_suffix(')');
    let series = within("label_values").and_then(|within| Some(within.rsplit_once(',')?.0));
    series.or_else(|| within("query_result")).with_context(|| format!("not a query of a variable: {query}"))
}

fn rules() -> Result<Vec<Value>> {
    let groups: Value = serde_yaml::from_str(&fs::read_to_string(file("rules.yaml"))?)?;
    let groups = groups["groups"].as_array().into_iter().flatten();
    Ok(groups.flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default()).collect())
}

fn dashboard(name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(file(&format!("dashboards/{name}.json")))?)?)
}

fn filled(expression: &str, variables: &[(&str, &str)]) -> String {
    variables.iter().fold(expression.to_owned(), |text, (name, value)| text.replace(name, value))
}

fn documents(text: &str) -> Result<Vec<Value>> {
    text.split("\n---\n").map(|document| Ok(serde_yaml::from_str(document)?)).collect()
}

fn file(name: &str) -> PathBuf {
    host::workspace().join("config/observability").join(name)
}

fn value(sample: &Value) -> Option<f64> {
    sample["value"][1].as_str()?.parse().ok()
}

/// A Prometheus in the network of the first node. Ended when dropped.
struct Prometheus<'a> {
    cluster: &'a Cluster,
    child: Child,
    port: u16,
    native: bool,
}

impl<'a> Prometheus<'a> {
    fn start(cluster: &'a Cluster, pods: &[Value], native: bool, port: u16) -> Result<Self> {
        let folder = host::cache()?.join(format!("prometheus-{port}"));
        // Of a run before this one.
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        let mut command = cluster.inside("prometheus")?;
        let by_job = native && is_by_job()?;
        let config = folder.join("prometheus.json");
        host::write(&config, configuration(native, by_job, pods)?.to_string())?;
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        if native && !by_job {
            command.arg("--enable-feature=native-histograms");
        }
        let log = fs::File::create(folder.join("log"))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        Ok(Self { cluster, child, port, native })
    }

    /// Why an expression has no answer, or not the one that it must have.
    fn wrong(&self, question: &Question) -> Result<()> {
        let Question { of, expression, needs_data } = question;
        let native = if self.native { "native" } else { "classic" };
        let result = self.query(expression).with_context(|| format!("{native}: {of}: {expression}"))?;
        ensure!(!needs_data || !result.is_empty(), "{native}: {of}: no data for {expression}");
        Ok(())
    }

    /// Fails unless the expression of an alert is true of a workload.
    fn fires(&self, alert: &str, workload: &str) -> Result<()> {
        let rules = rules()?;
        let rule = rules.iter().find(|rule| rule["alert"] == alert).context("no such alert")?;
        let result = self.query(rule["expr"].as_str().unwrap_or(""))?;
        let of_workload = |sample: &Value| {
            sample["metric"]["workload"] == workload && sample["metric"]["namespace"] == NAMESPACE
        };
        ensure!(result.iter().any(of_workload), "{alert} is not true of {workload}: {result:?}");
        Ok(())
    }

    fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let url = format!("http://127.0.0.1:{}/api/v1/query", self.port);
        let query = format!("query={expression}");
        let mut curl = self.cluster.inside("curl")?;
        curl.args(["-s", "-S", "-m", "10", "-G", &url, "--data-urlencode", &query]);
        let answer: Value = serde_json::from_str(&host::output(&mut curl)?)?;
        ensure!(answer["status"] == "success", "Prometheus says {}", answer["error"]);
        Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
    }

    /// The programs that nsenter has started for this server.
    fn signal(&self, signal: &str) {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        for child in children.split_whitespace() {
            // It may have ended by itself.
            let _ = host::output(Command::new("kill").args([signal, child]));
        }
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        for (signal, tries) in [("-TERM", 100), ("-KILL", 50)] {
            self.signal(signal);
            for _ in 0..tries {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Whether this Prometheus is asked for native histograms by a job's `scrape_native_histograms`, as since 3.8.
fn is_by_job() -> Result<bool> {
    // Early ones print the version to standard error.
    let mut command = Command::new("sh");
    let printed = host::output(command.args(["-c", "prometheus --version 2>&1"]))?;
    let version = printed.split("version ").nth(1).context("prometheus --version prints no version")?;
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    Ok((numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (3, 8))
}

/// The samples' scrape jobs and rules, with short intervals. Debian's Prometheus cannot ask Kubernetes, so it gets the
/// pods as it would find them itself: the samples' relabelling is carried out all the same.
fn configuration(native: bool, by_job: bool, pods: &[Value]) -> Result<Value> {
    let mut jobs = Vec::new();
    let names: &[&str] =
        if native { &["scrape-config.yaml"] } else { &["scrape-config.yaml", "scrape-istio-names.yaml"] };
    for name in names {
        let sample: Value = serde_yaml::from_str(&fs::read_to_string(file(name))?)?;
        jobs.extend(sample["scrape_configs"].as_array().cloned().unwrap_or_default());
    }
    for job in jobs.iter_mut().filter_map(Value::as_object_mut) {
        if !by_job {
            job.remove("scrape_native_histograms");
        }
        let discovery = job.remove("kubernetes_sd_configs").context("a job finds no pods")?;
        let wanted = discovery[0]["selectors"][0]["label"].as_str().unwrap_or_default().to_owned();
        let targets: Vec<Value> = pods.iter().flat_map(|pod| targets(pod, &wanted)).collect();
        job.insert("static_configs".to_owned(), json!(targets));
    }
    Ok(json!({
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [file("rules.yaml")],
        "scrape_configs": jobs,
    }))
}

fn pods(kube: &Kube) -> Result<Vec<Value>> {
    Ok(kube.json(&["get", "pods", "-A"])?["items"].as_array().cloned().unwrap_or_default())
}

/// What Prometheus' discovery of role `pod` makes of one with this label, as `key=value`; of any, if that is empty.
fn targets(pod: &Value, wanted: &str) -> Vec<Value> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let has = wanted.split_once('=').is_none_or(|(key, value)| pod["metadata"]["labels"][key] == value);
    let address = text(&pod["status"]["podIP"]);
    if !has || address.is_empty() {
        return Vec::new();
    }
    let owners = pod["metadata"]["ownerReferences"].as_array().into_iter().flatten();
    let controller =
        owners.into_iter().find(|owner| owner["controller"] == true).cloned().unwrap_or_default();
    let containers = ["containers", "initContainers"].map(|kind| pod["spec"][kind].as_array());
    let ports = containers.into_iter().flatten().flatten();
    let ports = ports.flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let target = |port: &Value| {
        json!({
            "targets": [format!("{address}:{}", port["containerPort"])],
            "labels": {
                "__meta_kubernetes_namespace": text(&pod["metadata"]["namespace"]),
                "__meta_kubernetes_pod_name": text(&pod["metadata"]["name"]),
                "__meta_kubernetes_pod_phase": text(&pod["status"]["phase"]),
                "__meta_kubernetes_pod_container_port_name": text(&port["name"]),
                "__meta_kubernetes_pod_controller_kind": text(&controller["kind"]),
                "__meta_kubernetes_pod_controller_name": text(&controller["name"]),
            },
        })
    };
    ports.map(target).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alert_has_rule_tests_in_which_it_fires_and_in_which_it_does_not() {
        let rules = rules().unwrap();
        let alerts: BTreeSet<&str> = rules.iter().filter_map(|rule| rule["alert"].as_str()).collect();
        assert!(alerts.len() > 10, "only {alerts:?} were found");
        let text = fs::read_to_string(host::workspace().join(RULE_TESTS)).unwrap();
        let file: Value = serde_yaml::from_str(&text).unwrap();
        let (mut firing, mut quiet) = (BTreeSet::new(), BTreeSet::new());
        for group in file["tests"].as_array().unwrap() {
            assert!(!group["input_series"].as_array().unwrap().is_empty(), "no series: {group}");
            let tests = group["alert_rule_test"].as_array().unwrap();
            let alert = tests[0]["alertname"].as_str().unwrap();
            assert!(tests.iter().all(|test| test["alertname"] == alert), "more than {alert}: {group}");
            let found: Vec<&Value> =
                tests.iter().flat_map(|test| test["exp_alerts"].as_array().unwrap()).collect();
            for found in &found {
                assert!(found["exp_labels"]["severity"].is_string(), "no labels: {found}");
                for text in ["summary", "description", "command"] {
                    assert!(found["exp_annotations"][text].is_string(), "no {text}: {found}");
                }
            }
            // A group in which an alert comes later is no proof that it can stay away.
            let names = if found.is_empty() { &mut quiet } else { &mut firing };
            names.insert(alert);
        }
        assert_eq!(firing, alerts, "left: alerts that fire in a group of {RULE_TESTS}");
        assert_eq!(quiet, alerts, "left: alerts that never fire in a group of {RULE_TESTS}");
    }
}
