//! `cargo xtask demo`: shows injection, mutual TLS, a MeshPolicy, a route, retries, a breaker and two rollouts on a real
//! cluster, with the output of kubectl, and then what `tulle` shows of them. Each step fails the demo unless the cluster
//! shows the expected result.

mod seen;
mod traffic;

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::build;
use crate::host;
use crate::images;
use crate::install;
use crate::kubectl::Kube;
use crate::progress::step;

const NAMESPACE: &str = "shop";

/// Runs the demo.
pub fn run(cluster: &str, keep: bool) -> Result<()> {
    build::prepare(images::TULLE, cluster)?;
    let _reserved = install::reserve(cluster)?;
    let kube = install::cluster(cluster)?;
    install::load_images(&kube)?;
    install::tulle(&kube)?;
    let demo = Demo { kube };
    let outcome = demo.run_steps();
    if let (Err(_), true) = (&outcome, keep) {
        eprintln!("the cluster keeps running; inspect it with: cargo xtask cluster kubectl -- get pods -A");
    }
    if outcome.is_ok() {
        demo.print_next_steps(keep);
    }
    if let (Kube::Embedded(cluster), false) = (&demo.kube, keep) {
        step("stopping the cluster");
        cluster.down()?;
    }
    outcome
}

struct Demo {
    kube: Kube,
}

/// Counts of the load generator.
#[derive(Clone, Debug)]
struct LoadCounts {
    sent: u64,
    /// Requests that have succeeded or failed.
    ended: u64,
    failed: u64,
    failures: Value,
    versions: Value,
}

impl Demo {
    fn run_steps(&self) -> Result<()> {
        self.injected()?;
        self.encrypted()?;
        self.denied()?;
        self.routed()?;
        self.saved()?;
        self.promoted()?;
        self.stopped()?;
        self.seen()
    }

    /// Prints a heading.
    fn heading(&self, heading: &str) {
        println!("\n\x1b[1m━━ {heading}\x1b[0m");
    }

    /// Runs a kubectl command, and prints it and its output.
    fn show(&self, arguments: &[&str]) -> Result<String> {
        let shown: Vec<String> = arguments
            .iter()
            .map(|a| if a.contains(' ') || a.contains('{') { format!("'{a}'") } else { (*a).to_owned() })
            .collect();
        println!("$ kubectl {}", shown.join(" "));
        let text = self.kube.run(arguments)?;
        println!("{}", text.trim_end());
        Ok(text)
    }

    fn injected(&self) -> Result<()> {
        self.heading("A label on the namespace, and every pod gets a sidecar at admission");
        // The shop of an earlier run is replaced. A namespace of the same name that the demo has not created is kept.
        let labels = self.kube.run(&[
            "get",
            "namespace",
            NAMESPACE,
            "--ignore-not-found",
            "-o",
            "jsonpath={.metadata.labels}",
        ])?;
        ensure!(
            labels.is_empty() || labels.contains("tulle-sample"),
            "this cluster has a namespace {NAMESPACE} that the demo has not created and would delete; use another cluster"
        );
        self.kube.run(&["delete", "namespace", NAMESPACE, "--ignore-not-found"])?;
        let shop = install::sample("shop.yaml")?;
        let (services, load) =
            shop.rsplit_once("---").context("config/samples/shop.yaml does not end with the load")?;
        self.kube.apply(services)?;
        for workload in ["deployment/web", "deployment/checkout", "deployment/payments"] {
            self.kube.rolled_out(NAMESPACE, workload, 120)?;
        }
        self.kube.apply(load)?;
        self.kube.rolled_out(NAMESPACE, "deployment/load", 60)?;
        let pods = self.show(&["get", "pods", "-n", NAMESPACE])?;
        let meshed = pods.lines().skip(1).filter(|line| line.contains("2/2")).count();
        ensure!(meshed == 9, "expected 9 pods that are 2/2, found {meshed}");
        Ok(())
    }

    fn encrypted(&self) -> Result<()> {
        self.heading("A request over mutual TLS: each service sees the identity of its client");
        let (_, answer) = self.call("web", "checkout")?;
        println!("checkout answered: {answer}");
        let answer: Value = serde_json::from_str(&answer)?;
        let expected = "spiffe://cluster.local/ns/shop/sa/web";
        ensure!(
            answer["client"] == expected,
            "checkout saw client {}, expected {expected}",
            answer["client"]
        );
        self.wait_for_traffic()?;
        let (with, without) = (self.latency("shop", "enabled")?, self.latency("shop-plain", "disabled")?);
        let names = ["p50_us", "p99_us"];
        let [p50, p99] =
            names.map(|name| (with[name].as_u64().unwrap_or(0), without[name].as_u64().unwrap_or(0)));
        println!("\nlatency at 200 requests/s to payments for 8 s, with the mesh and without:");
        println!("  p50 {} µs and {} µs, p99 {} µs and {} µs", p50.0, p50.1, p99.0, p99.1);
        self.kube.run(&["delete", "namespace", "shop-plain", "--wait=false"])?;
        self.memory()
    }

    /// Prints the resident memory of each program; only on the embedded cluster, whose processes are visible.
    fn memory(&self) -> Result<()> {
        let Kube::Embedded(cluster) = &self.kube else { return Ok(()) };
        // Every program is `/program` in its image; an environment variable identifies it.
        let script = "for p in /proc/[0-9]*; do [ \"$(readlink $p/exe)\" = /program ] || continue
            echo $(tr '\\0' '\\n' < $p/environ | grep -oE -m1 '^TULLE_(POD_UID|POD_IP|SIDECAR_IMAGE)=') $(grep VmRSS $p/status); done";
        let listed = host::output(cluster.inside("sh")?.args(["-c", script]))?;
        println!("\nmemory (resident; operator and webhook are debug builds here, which need more):");
        for (part, variable) in [
            ("sidecar", "TULLE_POD_UID="),
            ("operator", "TULLE_POD_IP="),
            ("webhook", "TULLE_SIDECAR_IMAGE="),
        ] {
            let mut kib: Vec<u64> = listed
                .lines()
                .filter(|line| line.starts_with(variable))
                .filter_map(|line| line.split_whitespace().rev().nth(1)?.parse().ok())
                .collect();
            ensure!(!kib.is_empty(), "found no process of the {part}");
            kib.sort_unstable();
            let mib = |at: usize| kib.get(at).map_or(0.0, |kib| *kib as f64 / 1024.0);
            let last = kib.len().saturating_sub(1);
            println!(
                "  {} × {part}: median {:.1} MiB, maximum {:.1} MiB",
                kib.len(),
                mib(kib.len() / 2),
                mib(last)
            );
        }
        Ok(())
    }

    fn denied(&self) -> Result<()> {
        self.heading("A MeshPolicy: only checkout may call payments");
        self.show(&["get", "meshpolicies", "-n", NAMESPACE]).ok();
        println!("before: web → payments: {}", self.call("web", "payments")?.0);
        let deny = install::sample("deny.yaml")?;
        println!("$ kubectl apply -f config/samples/deny.yaml");
        print!("{}", self.kube.apply(&deny)?);
        self.kube.wait_for("every sidecar to acknowledge the policy", 30, || {
            Ok(self.kube.field(NAMESPACE, "meshpolicy/payments", ".status.enforced")? == "2/2")
        })?;
        self.show(&["get", "meshpolicies", "-n", NAMESPACE])?;
        let (web, checkout) = (self.call("web", "payments")?.0, self.call("checkout", "payments")?.0);
        println!("after:  web → payments: {web}");
        println!("after:  checkout → payments: {checkout}");
        ensure!(
            web == "403" && checkout == "200",
            "expected 403 for web and 200 for checkout, found {web} and {checkout}"
        );
        Ok(())
    }

    fn promoted(&self) -> Result<()> {
        self.heading("A Canary: version 2 gets more traffic step by step");
        println!("$ kubectl apply -f config/samples/canary.yaml");
        print!("{}", self.kube.apply(&install::sample("canary.yaml")?)?);
        self.kube.wait_for("the Canary to record the stable revision", 20, || {
            Ok(self.canary(".status.phase")? == "Stable")
        })?;
        let before = self.load_counts()?;
        self.deploy("v2", 0)?;
        let seen = self.follow(|phase, revision_done| phase == "Stable" && revision_done, 180)?;
        for weight in ["5%", "25%", "50%"] {
            let shown = |line: &String| line.split_whitespace().any(|word| word == weight);
            ensure!(seen.iter().any(shown), "kubectl never showed weight {weight}");
        }
        self.show(&["get", "pods", "-n", NAMESPACE, "-l", "app=checkout"])?;
        let after = self.counts_after_in_flight()?;
        self.ensure_none_failed(&before, &after)?;
        println!("responses by version so far: {}", after.versions);
        Ok(())
    }

    fn stopped(&self) -> Result<()> {
        self.heading("A bad version: 20% errors, and the Canary stops it");
        let before = self.load_counts()?;
        self.deploy("v3", 20)?;
        self.follow(|phase, _| phase == "Failed", 180)?;
        self.show(&["get", "pods", "-n", NAMESPACE, "-l", "app=checkout"])?;
        println!("\nevidence: {}", self.canary(".status.evidenceSummary")?);
        thread::sleep(Duration::from_secs(2));
        let (stopped, later) = (self.load_counts()?, {
            thread::sleep(Duration::from_secs(4));
            self.load_counts()?
        });
        let failed = stopped.failed - before.failed;
        println!("requests that failed on the bad version: {failed} of {} sent", stopped.sent - before.sent);
        ensure!(later.failed == stopped.failed, "requests still fail after the bad version was stopped");
        ensure!(failed > 0, "the bad version got no traffic");
        self.show(&["events", "-n", NAMESPACE, "--for", "canary/checkout"]).map(drop)
    }

    fn print_next_steps(&self, keep: bool) {
        self.heading("Done");
        if keep {
            println!("The cluster keeps running. Commands to inspect it:");
            println!("  cargo xtask cluster kubectl -- get tulle -A");
            println!("  cargo xtask cluster kubectl -- describe canary -n shop checkout");
            println!("  cargo xtask cluster shell");
            println!("Stop it with: cargo xtask cluster down");
        } else {
            println!("To keep the cluster and inspect it: cargo xtask demo --keep");
        }
    }

    /// Changes the version of checkout.
    fn deploy(&self, version: &str, errors: u32) -> Result<()> {
        let arguments = format!(
            r#"[{{"op":"replace","path":"/spec/template/spec/containers/0/args","value":["serve","--name=checkout","--next=payments:80","--version={version}","--errors={errors}"]}}]"#
        );
        println!("$ kubectl patch deployment checkout … --version={version} --errors={errors}");
        self.kube
            .run(&["-n", NAMESPACE, "patch", "deployment", "checkout", "--type=json", "-p", &arguments])
            .map(drop)
    }

    /// Prints the Canary's line whenever it changes, until `done` holds for its phase and whether a rollout has ended
    /// since the start. Returns the printed lines.
    fn follow(&self, done: impl Fn(&str, bool) -> bool, seconds: u64) -> Result<Vec<String>> {
        println!("$ kubectl get canary -n {NAMESPACE} checkout --watch");
        let decided = self.canary(".status.history[0].ended")?;
        let mut seen: Vec<String> = Vec::new();
        let mut last = String::new();
        for _ in 0..seconds * 2 {
            let text = self.kube.run(&["get", "canary", "-n", NAMESPACE, "checkout"])?;
            let line = text.lines().nth(1).unwrap_or("").to_owned();
            let shape: Vec<&str> = line.split_whitespace().take(5).collect();
            let shape = shape.join(" ");
            if shape != last {
                if seen.is_empty() {
                    println!("{}", text.lines().next().unwrap_or(""));
                }
                println!("{line}");
                last = shape;
                seen.push(line);
            }
            let phase = self.canary(".status.phase")?;
            if done(&phase, self.canary(".status.history[0].ended")? != decided) {
                return Ok(seen);
            }
            thread::sleep(Duration::from_millis(500));
        }
        bail!("timed out after {seconds} s; last state of the Canary: {last}")
    }

    fn canary(&self, path: &str) -> Result<String> {
        self.kube.field(NAMESPACE, "canary/checkout", path)
    }

    /// Sends a request from one service to another; returns the HTTP status and the body.
    fn call(&self, from: &str, to: &str) -> Result<(String, String)> {
        self.call_with(from, to, &[])
    }

    /// The same with arguments for path and header. A redirect's body is where it leads.
    fn call_with(&self, from: &str, to: &str, more: &[&str]) -> Result<(String, String)> {
        let (pod, target) = (format!("deployment/{from}"), format!("{to}:80"));
        let call = ["-n", NAMESPACE, "exec", &pod, "-c", from, "--", "/program", "get", &target];
        let printed = self.kube.run(&[&call[..], more].concat())?;
        let (status, answer) = printed.trim().split_once(' ').unwrap_or((printed.trim(), ""));
        Ok((status.to_owned(), answer.to_owned()))
    }

    /// Measures the latency of Service `payments`, from a pod in the same namespace.
    fn latency(&self, namespace: &str, inject: &str) -> Result<Value> {
        if inject == "disabled" {
            let shop = install::sample("shop.yaml")?.replace("namespace: shop", "namespace: shop-plain");
            let shop = shop
                .replace("name: shop\n", "name: shop-plain\n")
                .replace("tulle.dev/inject: enabled", "plain: shop");
            let wanted = |part: &&str| part.contains("name: payments") || part.contains("kind: Namespace");
            let parts: Vec<&str> = shop.split("---\n").filter(wanted).collect();
            self.kube.apply(&parts.join("---\n"))?;
            self.kube.rolled_out(namespace, "deployment/payments", 60)?;
        }
        self.kube.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: probe, namespace: {namespace}}}, spec: {{restartPolicy: Never, serviceAccountName: payments, containers: [{{name: probe, image: 'tulle.local/shop:dev', args: [load, '--target=payments:80', '--rate=200', '--seconds=8', '--post-every=0']}}]}}}}"
        ))?;
        self.kube.wait_for("the probe to end", 60, || {
            Ok(self.kube.field(namespace, "pod/probe", ".status.phase")? == "Succeeded")
        })?;
        let text = self.kube.run(&["-n", namespace, "logs", "probe", "-c", "probe", "--tail=1"])?;
        self.kube.run(&["-n", namespace, "delete", "pod", "probe", "--wait=false"])?;
        Ok(serde_json::from_str(text.trim())?)
    }

    fn load_line(&self) -> Result<Value> {
        let text = self.kube.run(&["-n", NAMESPACE, "logs", "deployment/load", "-c", "load", "--tail=1"])?;
        Ok(serde_json::from_str(text.trim())?)
    }

    fn load_counts(&self) -> Result<LoadCounts> {
        let line = self.load_line()?;
        Ok(LoadCounts {
            sent: line["sent"].as_u64().unwrap_or(0),
            ended: line["ok"].as_u64().unwrap_or(0) + line["failed"].as_u64().unwrap_or(0),
            failed: line["failed"].as_u64().unwrap_or(0),
            failures: line["failures"].clone(),
            versions: line["versions"].clone(),
        })
    }

    /// The counts once every request that is now in flight has ended, because a request that hangs is counted as failed
    /// only after its timeout.
    fn counts_after_in_flight(&self) -> Result<LoadCounts> {
        let mut now = self.load_counts()?;
        let sent = now.sent;
        self.kube.wait_for("requests in flight to end", 60, || {
            now = self.load_counts()?;
            Ok(now.ended >= sent)
        })?;
        Ok(now)
    }

    fn wait_for_traffic(&self) -> Result<()> {
        self.kube.wait_for("load", 30, || Ok(self.load_counts()?.sent > 500))
    }

    fn ensure_none_failed(&self, before: &LoadCounts, after: &LoadCounts) -> Result<()> {
        let (sent, failed) = (after.sent - before.sent, after.failed - before.failed);
        println!("requests while the version changed: {sent}, failed: {failed}");
        ensure!(failed == 0, "{failed} requests failed: {}", after.failures);
        Ok(())
    }
}
