//! Each rule finds what it is for, and valid manifests have no findings.

use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::jiff::Timestamp;

use super::cluster::{callers, has};
use super::read::{Input, documents, files};
use super::routes::beside;
use super::rules::{Finding, Level, RULES};
use super::settings::is_quantity;
use super::{FailOn, check, text};
use crate::output::Output;

fn now() -> Timestamp {
    "2026-12-01T12:00:00Z".parse().unwrap()
}

fn read(yaml: &str) -> Input {
    let mut input = Input::default();
    documents("shop.yaml", yaml, &mut input);
    input
}

/// `T1103 MeshPolicy shop/p: …`, one per finding.
fn lint(yaml: &str) -> Vec<String> {
    let found = check(&read(yaml), "shop", now());
    found
        .into_iter()
        .map(|finding| format!("{} {}: {}", finding.id, finding.object, finding.message))
        .collect()
}

fn policy(spec: &str) -> Vec<String> {
    lint(&format!(
        "{{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {{name: p}}, spec: {{{spec}}}}}"
    ))
}

fn canary(spec: &str) -> Vec<String> {
    lint(&format!(
        "{{apiVersion: tulle.dev/v1alpha1, kind: Canary, metadata: {{name: web}}, spec: {{target: {{kind: Deployment, name: web}}, {spec}}}}}"
    ))
}

/// The one finding has this id, and says this.
fn assert_one(found: &[String], id: &str, part: &str) {
    let [one] = found else { panic!("expected one {id}: {found:?}") };
    assert!(one.starts_with(id) && one.contains(part), "expected {id} … {part}: {one}");
}

const SERVICE: &str = "target: {kind: Service, name: web}";

#[test]
fn every_id_is_used_once_and_has_a_sentence() {
    let mut ids: Vec<&str> = RULES.iter().map(|rule| rule.id).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    ids.dedup();
    assert_eq!(ids.len(), RULES.len());
    for rule in RULES {
        assert!(rule.id.len() == 5 && rule.about.ends_with('.'), "{}", rule.id);
    }
}

#[test]
fn a_finding_is_printed_with_its_id_object_file_and_hint() {
    let yaml = format!(
        "{{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {{name: p}}, spec: {{{SERVICE}, timeout: {{reqest: 2s}}}}}}"
    );
    let found = check(&read(&yaml), "shop", now());
    let expected = "\
error T1101 MeshPolicy shop/p: spec.timeout.reqest is not a field of this kind
  file: shop.yaml
  hint: write request?
";
    assert_eq!(text(&found[0], &Output::default()), expected);
}

#[test]
fn the_samples_have_no_errors() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/samples");
    let input = files(&[samples]).unwrap();
    assert!(input.documents.iter().filter(|document| document.is_tulle()).count() >= 10);
    let errors: Vec<_> = check(&input, "shop", now())
        .into_iter()
        .filter(|finding| finding.level == Level::Error && finding.id != "T1201")
        .collect();
    assert!(errors.is_empty(), "several samples of a Canary may be for one target: {errors:?}");
}

#[test]
fn what_cannot_be_read_names_the_file() {
    assert_one(&lint("a: [1"), "T1001 shop.yaml", "");
    assert_one(&lint("just text"), "T1001 shop.yaml", "not an object");
    assert_eq!(lint("---\n---\n"), Vec::<String>::new());
}

#[test]
fn an_unknown_kind_or_version_is_found() {
    let found = lint("{apiVersion: tulle.dev/v1alpha1, kind: MeshPolice, metadata: {name: p}}");
    assert_one(&found, "T1002", "no kind MeshPolice");
    let found = lint("{apiVersion: tulle.dev/v7, kind: MeshPolicy, metadata: {name: p}}");
    assert_one(&found, "T1002", "tulle.dev/v7");
    assert_eq!(lint("{apiVersion: v1, kind: Unheard, metadata: {name: p}, spec: 1}"), Vec::<String>::new());
}

#[test]
fn a_kind_of_tulle_with_another_group_or_without_one_is_found() {
    let found = check(&read("{kind: MeshPolicy, metadata: {name: p}}"), "shop", now());
    let [one] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((one.id, one.hint.as_deref()), ("T1002", Some("did you mean tulle.dev/v1alpha1?")));
    let found = lint("{apiVersion: mesh.example/v1, kind: MeshPolicy, metadata: {name: p}}");
    assert_one(&found, "T1002", "mesh.example/v1 is not its group");
    let flagger = lint("{apiVersion: flagger.app/v1beta1, kind: Canary, metadata: {name: p}}");
    assert_eq!(flagger, Vec::<String>::new());
}

#[test]
fn items_have_the_kind_of_their_list_unless_they_say_it() {
    let list = "{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicyList, items: [{metadata: {name: p}}]}";
    assert_one(&lint(list), "T1102 MeshPolicy shop/p", "spec is missing");
    let mixed = "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: p}}]}";
    assert_eq!(read(mixed).documents[0].kind(), "Pod");
}

#[test]
fn a_byte_order_mark_is_not_part_of_the_text() {
    let found = lint("\u{feff}{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {name: p}}");
    assert_one(&found, "T1102", "spec is missing");
}

#[test]
fn below_a_directory_a_bad_file_does_not_hide_the_others() {
    let directory = std::env::temp_dir().join(format!("tulle-lint-below-{}", std::process::id()));
    fs::create_dir_all(directory.join("below")).unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).unwrap();
    put("a.yaml", b"\xff\xfe not text");
    put("below/chart.yaml", b"metadata:\n  name: {{ .Values.name }}\n");
    put("below/settings.json", b"[1, 2]");
    put("below/z.yaml", b"{apiVersion: v1, kind: Pod, metadata: {name: p}}");
    std::os::unix::fs::symlink("/does/not/exist", directory.join("gone.yaml")).unwrap();
    let input = files(std::slice::from_ref(&directory));
    fs::remove_dir_all(&directory).unwrap();
    let input = input.unwrap();
    let names: Vec<&str> = input.documents.iter().map(|document| document.name()).collect();
    assert_eq!(names, ["p"]);
    let found = check(&input, "shop", now());
    let ids: Vec<(&str, bool)> =
        found.iter().map(|finding| (finding.id, finding.object.ends_with("chart.yaml"))).collect();
    assert_eq!(ids, [("T1001", false), ("T1001", false), ("T1004", true)]);
}

#[test]
fn files_without_an_object_are_a_warning() {
    let finding = Finding::of_nothing(&read("---\n")).unwrap();
    assert_eq!((finding.id, finding.level), ("T1005", Level::Warning));
    assert_eq!(Finding::of_nothing(&read("{kind: Pod}")), None);
    assert_eq!(Finding::of_nothing(&read("just text")), None, "it has a finding already");
}

#[test]
fn unknown_fields_are_found_where_types_would_ignore_them_too() {
    assert_one(&policy(&format!("{SERVICE}, mtls: Strict, acess: {{}}")), "T1101", "spec.acess");
    assert_one(&canary("steps: [{weight: 5, holds: 2m}]"), "T1101", "spec.steps[0].holds");
    let config =
        "{apiVersion: tulle.dev/v1alpha1, kind: MeshConfig, metadata: {name: mesh}, spec: {mtsl: Strict}}";
    assert_one(&lint(config), "T1101 MeshConfig mesh", "spec.mtsl");
}

#[test]
fn wrong_types_and_missing_fields_are_found_with_their_place() {
    assert_one(&policy("mtls: Strict"), "T1102", "spec.target is missing");
    let found = policy(&format!("{SERVICE}, limits: {{concurrency: many}}"));
    assert_one(&found, "T1102", "spec.limits.concurrency must be an integer, and is the string \"many\"");
    assert_one(
        &lint("{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {name: p}}"),
        "T1102",
        "spec is missing",
    );
}

#[test]
fn invalid_values_are_found_by_the_validators_of_the_kinds() {
    for (section, part) in [
        ("timeout: {request: 2 s}", "spec.timeout.request"),
        ("timeout: {request: 1s, attempt: 2s}", "spec.timeout.attempt"),
        ("retry: {on: [reset], budget: 20}", "spec.retry.budget"),
        ("breaker: {ejectFor: 1h}", "spec.breaker.ejectFor"),
        ("balance: {by: Hash}", "spec.balance.hash"),
        ("limits: {concurrency: 0}", "spec.limits.concurrency"),
        ("mtls: strict", "spec.mtls"),
        ("access: {allow: [{from: [{cidr: '10.1'}]}]}", "spec.access.allow[0].from: invalid CIDR"),
        ("access: {allow: [{from: [{cidr: 10.0.0.0/33}]}]}", "invalid CIDR"),
        ("access: {allow: [{to: [{paths: [/a//b]}]}]}", "spec.access.allow[0].to.paths"),
        ("access: {allow: [{to: [{methods: [get]}]}]}", "in upper case"),
    ] {
        let found = policy(&format!("{SERVICE}, {section}"));
        assert!(
            found.iter().any(|one| one.starts_with("T110") && one.contains(part)),
            "{section}: {found:?}"
        );
    }
    for (section, part) in [
        ("deadline: soon", "spec.deadline"),
        ("deadline: 0s", "spec.deadline"),
        ("judge: {confidence: 100%}", "spec.judge.confidence"),
        ("judge: {warmUp: 1 m}", "spec.judge.warmUp"),
        ("judge: {latency: {quantile: p0}}", "spec.judge.latency.quantile"),
        ("judge: {objectives: {p99: 0s}}", "spec.judge.objectives.p99"),
        ("steps: [{weight: 101}]", "spec.steps[0].weight"),
        ("steps: [{weight: 0}]", "spec.steps[0].weight"),
        ("steps: [{weight: 5, hold: long}]", "spec.steps[0].hold"),
        ("sticky: {cookie: a b}", "spec.sticky.cookie"),
    ] {
        let found = canary(section);
        assert!(
            found.iter().any(|one| one.starts_with("T1103") && one.contains(part)),
            "{section}: {found:?}"
        );
    }
}

#[test]
fn fields_that_do_not_go_together_are_found() {
    for spec in [
        "target: {kind: Service}, mtls: Strict",
        "target: {kind: Namespace, name: web}, mtls: Strict",
        "target: {kind: Workload, name: web}, mtls: Strict",
        "target: {kind: Service, name: web}, access: {}",
        "target: {kind: Service, name: web}, timeout: {}",
        "target: {kind: Service, name: web}, access: {allow: [{from: [{cidr: 10.0.0.0/8, namespace: a}]}]}",
    ] {
        assert_one(&policy(spec), "T1104", "spec.");
    }
    for spec in [
        "steps: [{weight: 5, mirror: 5}]",
        "steps: [{hold: 2m}]",
        "steps: [{pause: {}, hold: 2m}]",
        "steps: [{match: [{}]}]",
    ] {
        assert_one(&canary(spec), "T1104", "spec.steps[0]");
    }
}

#[test]
fn what_is_valid_and_has_no_effect_or_a_risk_is_a_warning() {
    let workload = "target: {kind: Workload, selector: {matchLabels: {app: web}}}";
    assert_one(&policy(&format!("{workload}, timeout: {{request: 2s}}")), "T1105", "timeout has no effect");
    assert_one(&policy(SERVICE), "T1105", "no section");
    assert_one(&policy(&format!("{SERVICE}, balance: {{zone: Only}}")), "T1106", "spec.balance.zone");
    let faults = |until: &str| {
        policy(&format!("{SERVICE}, faults: {{abort: {{status: 503, of: 1%}}, until: '{until}'}}"))
    };
    assert_one(&faults("2026-12-01T11:59:59Z"), "T1105", "has passed");
    assert_one(&faults("2026-12-02T12:00:01Z"), "T1103", "24 hours");
    assert_eq!(faults("2026-12-02T12:00:00Z"), Vec::<String>::new());
    assert_one(&canary("steps: [{weight: 10}, {weight: 5}]"), "T1202", "does not grow");
}

#[test]
fn the_settings_of_the_mesh_are_checked() {
    let config = |name: &str, spec: &str| {
        lint(&format!(
            "{{apiVersion: tulle.dev/v1alpha1, kind: MeshConfig, metadata: {{name: {name}}}, spec: {{{spec}}}}}"
        ))
    };
    assert_eq!(config("mesh", ""), Vec::<String>::new());
    assert_one(&config("other", ""), "T1104", "metadata.name");
    assert_one(&config("mesh", "certificates: {leafLifetime: 10s}"), "T1103", "at least 20s");
    assert_one(&config("mesh", "certificates: {leafLifetime: 8d}"), "T1106", "7 days");
    assert_one(&config("mesh", "sidecar: {resources: {requests: {cpu: fast}}}"), "T1103", "requests.cpu");
    assert_one(&config("mesh", "sidecar: {resources: {limits: {gpu: '1'}}}"), "T1103", "only cpu and memory");
    assert_one(&config("mesh", "trustDomain: Cluster.Local"), "T1103", "spec.trustDomain");
}

#[test]
fn an_address_or_a_share_of_traces_that_the_api_server_rejects_is_found() {
    let config = |endpoint: &str, sampling: &str| {
        lint(&format!(
            "{{apiVersion: tulle.dev/v1alpha1, kind: MeshConfig, metadata: {{name: mesh}}, spec: {{tracing: {{endpoint: '{endpoint}', sampling: {sampling}}}}}}}"
        ))
    };
    let good = "http://collector.observability:4317";
    for endpoint in [good, "http://[fd00::1]:4317", "http://10.0.0.1:4317", "http://c-1:12345"] {
        assert_eq!(config(endpoint, "1%"), Vec::<String>::new(), "{endpoint}");
    }
    for endpoint in [
        "collector:4317",
        "https://collector:4317",
        "http://collector",
        "http://collector:4317/",
        "http://-collector:4317",
        "http://collector:431700",
        "http://[]:4317",
    ] {
        assert_one(&config(endpoint, "1%"), "T1103 MeshConfig mesh", "spec.tracing.endpoint");
    }
    for sampling in ["0%", "100%", "100.0%", "0.0001%", "99.5%"] {
        assert_eq!(config(good, sampling), Vec::<String>::new(), "{sampling}");
    }
    for sampling in ["200%", "100.1%", "1.00001%", "1.%", ".5%", "ten", "-1%"] {
        assert_one(&config(good, sampling), "T1103", "spec.tracing.sampling");
    }
}

#[test]
fn a_name_that_the_api_server_rejects_is_found() {
    let named = |name: &str| {
        lint(&format!(
            "{{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {{name: {name}}}, spec: {{{SERVICE}, mtls: Strict}}}}"
        ))
    };
    for name in ["p", "p-1", "a.b", "'1'"] {
        assert_eq!(named(name), Vec::<String>::new(), "{name}");
    }
    for name in ["X_y", "-a", "a-", "a..b", "a/b"] {
        assert_one(&named(name), "T1103", "metadata.name: invalid name");
    }
}

#[test]
fn a_key_that_is_written_twice_is_found_and_the_other_documents_are_read() {
    let doubled = format!(
        "apiVersion: tulle.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: p}}\nspec: {{{SERVICE}, mtls: Strict, mtls: Disabled}}\n"
    );
    let input = read(&format!("{doubled}---\n{{apiVersion: v1, kind: Pod, metadata: {{name: after}}}}\n"));
    assert_eq!(input.documents.iter().map(|one| one.name()).collect::<Vec<_>>(), ["after"]);
    assert_one(&lint(&doubled), "T1001 shop.yaml", "key mtls is written twice");
    assert_one(&lint("{\"kind\": \"Pod\", \"kind\": \"Pod\"}"), "T1001", "key kind is written twice");
    let plain = read("{a: [1, -2, 0.5, true, null, 'x', {b: ~}], 7: y}");
    let expected = serde_json::json!({"a": [1, -2, 0.5, true, null, "x", {"b": null}], "7": "y"});
    assert_eq!(plain.documents[0].value, expected);
}

#[test]
fn a_named_file_that_is_not_text_is_a_finding() {
    let file = std::env::temp_dir().join(format!("tulle-lint-bytes-{}.yaml", std::process::id()));
    fs::write(&file, b"\xff\xfe not text").unwrap();
    let input = files(std::slice::from_ref(&file));
    fs::remove_file(&file).unwrap();
    let found = check(&input.unwrap(), "shop", now());
    assert_eq!(found.iter().map(|one| one.id).collect::<Vec<_>>(), ["T1001"]);
}

#[test]
fn a_value_out_of_range_is_reported_once_and_says_what_to_write() {
    let found = policy(&format!("{SERVICE}, limits: {{concurrency: 0}}"));
    assert_one(&found, "T1103", "write 1 or more");
}

#[test]
fn labels_and_annotations_without_effect_are_found_where_they_stand() {
    let namespace =
        |labels: &str| lint(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: n, {labels}}}}}"));
    assert_eq!(namespace("labels: {tulle.dev/inject: required, team: a}"), Vec::<String>::new());
    assert_one(
        &namespace("labels: {tulle.dev/inject: 'true'}"),
        "T1109",
        "tulle.dev/inject=true has no effect",
    );
    assert_one(&namespace("labels: {tulle.dev/injcet: enabled}"), "T1109", "no label tulle.dev/injcet");
    assert_one(&namespace("annotations: {tulle.dev/inject: enabled}"), "T1109", "no annotation");
    let pod =
        "{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {tulle.dev/skip-inbound-port: '80'}}}";
    let found = check(&read(pod), "shop", now());
    let [one] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((one.id, one.level), ("T1109", Level::Warning));
    assert_eq!(one.hint.as_deref(), Some("did you mean tulle.dev/skip-inbound-ports?"));
    let workload = |of_workload: &str, of_pod: &str| {
        lint(&format!(
            "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: d, annotations: {{{of_workload}}}}}, spec: {{template: {{metadata: {{annotations: {{{of_pod}}}}}}}}}}}"
        ))
    };
    assert_eq!(workload("", "tulle.dev/workers: '2'"), Vec::<String>::new());
    let mistyped = workload("", "tulle.dev/colour: red");
    assert_one(&mistyped, "T1109 Deployment shop/d", "spec.template.metadata.annotations");
    assert_one(&workload("tulle.dev/workers: '2'", ""), "T1109", "no effect on a Deployment");
    let both = "tulle.dev/workers: '2'";
    assert_eq!(workload(both, both), Vec::<String>::new(), "a tool that annotates everything alike");
    let labelled = |of_workload: &str, of_pod: &str| {
        lint(&format!(
            "{{apiVersion: batch/v1, kind: CronJob, metadata: {{name: c, labels: {{{of_workload}}}}}, spec: {{jobTemplate: {{metadata: {{labels: {{{of_workload}}}}}, spec: {{template: {{metadata: {{labels: {{{of_pod}}}}}}}}}}}}}}}"
        ))
    };
    let opt_out = "tulle.dev/inject: disabled";
    assert_eq!(labelled(opt_out, opt_out), Vec::<String>::new());
    let found = labelled(opt_out, "");
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().any(|one| one.contains(" metadata.labels: tulle.dev/inject")), "{found:?}");
    assert!(found.iter().any(|one| one.contains("spec.jobTemplate.metadata.labels")), "{found:?}");
}

#[test]
fn quantities_are_those_of_kubernetes() {
    for valid in ["1", "0.5", "20m", "32Mi", "1e3", "2E", "100k"] {
        assert!(is_quantity(valid), "{valid}");
    }
    for invalid in ["", "-1", "fast", "1 Gi", "1GB", "1.2.3", "Mi"] {
        assert!(!is_quantity(invalid), "{invalid}");
    }
}

#[test]
fn a_target_that_is_not_in_the_files_is_found_only_where_its_kind_is() {
    let policy = "apiVersion: tulle.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {name: p}\nspec: {target: {kind: Service, name: web}, mtls: Strict}\n";
    let service =
        |name: &str| format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{}}\n");
    assert_eq!(lint(policy), Vec::<String>::new());
    assert_eq!(lint(&format!("{policy}{}", service("web"))), Vec::<String>::new());
    assert_one(&lint(&format!("{policy}{}", service("other"))), "T1107", "no Service shop/web");
    let by_labels = "apiVersion: tulle.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {name: p}\nspec: {target: {kind: Workload, selector: {matchLabels: {app: web}}}, mtls: Strict}\n";
    let workload = |app: &str| {
        format!(
            "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\nspec: {{template: {{metadata: {{labels: {{app: {app}}}}}}}}}\n"
        )
    };
    assert_eq!(lint(&format!("{by_labels}{}", workload("web"))), Vec::<String>::new());
    assert_one(&lint(&format!("{by_labels}{}", workload("db"))), "T1107", "no workload");
}

#[test]
fn a_route_whose_parent_is_a_service_without_its_group_is_found() {
    let route = |parent: &str| {
        lint(&format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: r}}, spec: {{parentRefs: [{{{parent}}}]}}}}"
        ))
    };
    assert_one(
        &route("kind: Service, name: web"),
        "T1106 HTTPRoute shop/r",
        "parentRefs[0]: kind Service without",
    );
    assert_eq!(route("group: '', kind: Service, name: web"), Vec::<String>::new());
    assert_eq!(route("name: gateway"), Vec::<String>::new(), "a Gateway");
}

#[test]
fn the_service_accounts_that_rules_name_are_looked_for_in_their_namespaces() {
    let yaml = "{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {name: p}, spec: {access: {
        allow: [{}, {from: [{namespace: pay}, {serviceAccount: frnt}, {serviceAccount: till, namespace: pay}]}],
        deny: [{from: [{serviceAccount: frnt}, {serviceAccount: any, namespaceLabels: {team: pay}}]}]}}}";
    let input = read(yaml);
    let found: Vec<String> = callers(&input.documents[0], "shop")
        .into_iter()
        .map(|(caller, place)| format!("{}/{} {place}", caller.namespace, caller.account))
        .collect();
    assert_eq!(found, ["pay/till spec.access.allow[1].from[2]", "shop/frnt spec.access.allow[1].from[1]"]);
}

#[test]
fn an_object_that_the_files_have_is_not_missed_in_the_cluster() {
    let input = read(
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: front}}\n---\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: till, namespace: pay}}",
    );
    let made = |kind: &str, namespace: &str, name: &str| has(&input.documents, "shop", kind, namespace, name);
    assert!(made("ServiceAccount", "shop", "front") && made("ServiceAccount", "pay", "till"));
    assert!(!made("ServiceAccount", "pay", "front") && !made("ServiceAccount", "shop", "till"));
    assert!(!made("Service", "shop", "front"));
}

#[test]
fn a_rule_that_another_route_has_too_is_found_for_the_same_clients_and_port() {
    let routes = |rest: &str, namespace: &str, matches: &str| {
        let head = "apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute";
        let parent = "group: '', kind: Service, name: web, namespace: shop";
        lint(&format!(
            "{{{head}, metadata: {{name: a}}, spec: {{parentRefs: [{{{parent}, port: 80}}], rules: [{{matches: [{{path: {{value: /api}}}}]}}, {{}}]}}}}\n---\n\
             {{{head}, metadata: {{name: b, namespace: {namespace}}}, spec: {{parentRefs: [{{{parent}{rest}}}], rules: [{{matches: [{matches}]}}]}}}}"
        ))
    };
    assert_one(
        &routes("", "shop", "{path: {type: PathPrefix, value: /api}}"),
        "T1110 HTTPRoute shop/b",
        "spec.rules[0] matches the same requests to Service shop/web as spec.rules[0] of HTTPRoute a",
    );
    assert_one(&routes(", port: 80", "shop", ""), "T1110", "as spec.rules[1] of HTTPRoute a");
    let none = Vec::<String>::new();
    assert_eq!(routes("", "shop", "{path: {type: Exact, value: /api}}"), none);
    assert_eq!(routes(", port: 81", "shop", ""), none, "another port");
    assert_eq!(routes(", sectionName: admin", "shop", ""), none, "perhaps another port");
    assert_eq!(routes("", "client", ""), none, "it is for clients of another namespace");
}

#[test]
fn a_rule_that_a_route_of_the_cluster_has_too_is_found_unless_it_is_the_same_route() {
    let route = |name: &str| {
        read(&format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: {name}, namespace: shop}}, spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{{}}]}}}}"
        ))
    };
    let beside = |stored: &str| beside(&route("a").documents, &route(stored).documents, "shop");
    let found = beside("b");
    let [one] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((one.id, one.object.as_str()), ("T1110", "HTTPRoute shop/a"));
    assert_eq!(beside("a"), Vec::new());
}

#[test]
fn two_policies_or_canaries_for_one_target_are_found_and_a_shadow_beside_one_is_not() {
    let policy = |name: &str, rest: &str| {
        format!(
            "---\napiVersion: tulle.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: {name}}}\nspec: {{{SERVICE}, {rest}}}\n"
        )
    };
    let both = policy("a", "mtls: Strict") + &policy("b", "mtls: Permissive");
    assert_one(
        &lint(&both),
        "T1108 MeshPolicy shop/b",
        "MeshPolicy a has the same target, and sets mtls too",
    );
    let apart = policy("a", "mtls: Strict") + &policy("b", "limits: {concurrency: 5}");
    assert_eq!(lint(&apart), Vec::<String>::new());
    let shadow = policy("a", "mtls: Strict") + &policy("b", "mode: Shadow, mtls: Permissive");
    assert_eq!(lint(&shadow), Vec::<String>::new());
    let canary = |name: &str| {
        format!(
            "---\napiVersion: tulle.dev/v1alpha1\nkind: Canary\nmetadata: {{name: {name}}}\nspec: {{target: {{kind: Deployment, name: web}}}}\n"
        )
    };
    assert_one(&lint(&(canary("a") + &canary("b"))), "T1201 Canary shop/b", "Canary a");
}

#[test]
fn a_target_whose_strategy_hinders_its_canary_is_found_in_whatever_order_they_stand() {
    let canary = "---\napiVersion: tulle.dev/v1alpha1\nkind: Canary\nmetadata: {name: c}\nspec: {target: {kind: Deployment, name: web}}\n";
    let workload = |kind: &str, name: &str, spec: &str| {
        format!(
            "---\napiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    };
    let recreate = workload("Deployment", "web", "strategy: {type: Recreate}");
    for files in [canary.to_owned() + &recreate, recreate.clone() + canary] {
        let part = "Canary c targets it, and it has strategy Recreate";
        assert_one(&lint(&files), "T1203 Deployment shop/web", part);
    }
    assert_eq!(lint(&recreate), Vec::<String>::new(), "without a Canary any strategy will do");
    let with = |spec: &str| lint(&(canary.to_owned() + &workload("Deployment", "web", spec)));
    let unavailable = with("replicas: 2, strategy: {rollingUpdate: {maxUnavailable: 100%}}");
    assert_one(&unavailable, "T1203", "may lose all its pods at once");
    let at_present = with("replicas: 2, strategy: {rollingUpdate: {maxUnavailable: 2}}");
    assert_one(&at_present, "T1204", "may lose all its pods at once (replicas 2");
    let surge = with("replicas: 2, strategy: {rollingUpdate: {maxSurge: 0}}");
    assert_one(&surge, "T1204", "PodDisruptionBudget");
    assert_eq!(with("replicas: 1"), Vec::<String>::new());
    let other =
        workload("Deployment", "api", "strategy: {type: Recreate}") + &workload("Deployment", "web", "");
    assert_eq!(lint(&(canary.to_owned() + &other)), Vec::<String>::new());
    let set = "---\napiVersion: tulle.dev/v1alpha1\nkind: Canary\nmetadata: {name: c}\nspec: {target: {kind: StatefulSet, name: db}}\n";
    let by_hand = workload("StatefulSet", "db", "updateStrategy: {type: OnDelete}");
    assert_one(&lint(&(set.to_owned() + &by_hand)), "T1204 StatefulSet shop/db", "OnDelete");
}

#[test]
fn lists_are_taken_apart_and_directories_are_read_by_name() {
    let list =
        "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod}, {apiVersion: v1, kind: Service}]}";
    let kinds: Vec<String> = read(list).documents.iter().map(|one| one.kind().to_owned()).collect();
    assert_eq!(kinds, ["Pod", "Service"]);

    let folder = std::env::temp_dir().join(format!("tulle-lint-names-{}", std::process::id()));
    fs::create_dir_all(folder.join("deep")).unwrap();
    for (file, name) in
        [("b.yml", "b"), ("deep/c.json", "c"), ("a.yaml", "a"), (".d.yaml", "d"), ("e.txt", "e")]
    {
        fs::write(folder.join(file), format!("{{\"kind\": \"{name}\"}}")).unwrap();
    }
    let found = files(std::slice::from_ref(&folder)).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let kinds: Vec<&str> = found.documents.iter().map(|one| one.kind()).collect();
    assert_eq!(kinds, ["a", "b", "c"]);
    assert!(files(&[PathBuf::from("/does/not/exist.yaml")]).is_err());
}

#[test]
fn the_level_that_fails_is_chosen() {
    assert!(FailOn::Error.includes(Level::Error) && !FailOn::Error.includes(Level::Warning));
    assert!(FailOn::Warning.includes(Level::Warning));
    assert!(!FailOn::Never.includes(Level::Error));
}
