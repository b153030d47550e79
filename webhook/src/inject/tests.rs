//! Real-world pods, before and after.

use json_patch::patch;
use serde_json::{Value, json};

use super::*;

pub(super) fn context(mode: Mode) -> Context {
    Context {
        mode,
        namespace: Namespace { name: "shop".into(), ..Namespace::default() },
        defaults: SidecarDefaults::default(),
        exempt: false,
        needs_approval: false,
        image: "tulle/sidecar:test".into(),
        operator: "tulle-operator.tulle-system.svc:26160".into(),
        operator_addresses: Vec::new(),
        operator_identity: "tulle-system/tulle-operator".into(),
        trust_domain: "cluster.local".into(),
        key: SealKey::derive(b"of the tests"),
    }
}

fn injected(pod: &Value, context: &Context) -> (Value, Vec<String>) {
    let (outcome, warnings) = inject(pod, context);
    let Outcome::Inject(operations) = outcome else { panic!("{outcome:?}") };
    let mut pod = pod.clone();
    patch(&mut pod, &operations).unwrap();
    (pod, warnings)
}

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/pods/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn names(pod: &Value, list: &str) -> Vec<String> {
    containers_at(pod, &format!("/spec/{list}")).map(|container| name_of(container).to_owned()).collect()
}

#[test]
fn pods_of_every_kind_of_workload_come_out_as_before() {
    for name in ["deployment", "statefulset", "job", "daemonset", "bare"] {
        let (pod, warnings) = injected(&fixture(name), &context(Mode::Enabled));
        insta::assert_yaml_snapshot!(name, json!({"pod": pod, "warnings": warnings}));
    }
}

#[test]
fn the_sidecar_comes_before_everything_that_the_pod_had() {
    let (pod, _) = injected(&fixture("statefulset"), &context(Mode::Enabled));
    assert_eq!(names(&pod, "initContainers")[..2], [INIT, PROXY]);
    assert_eq!(
        names(&pod, "initContainers").len(),
        2 + names(&fixture("statefulset"), "initContainers").len()
    );
}

#[test]
fn injecting_twice_changes_nothing() {
    let (once, _) = injected(&fixture("deployment"), &context(Mode::Enabled));
    assert_eq!(inject(&once, &context(Mode::Enabled)).0, Outcome::Skip);
}

#[test]
fn a_required_sidecar_cannot_be_impersonated() {
    let mut plain = fixture("deployment");
    assert!(
        matches!(inject(&plain, &context(Mode::Required)).0, Outcome::Refuse(why) if why.contains("skip-outbound-ports")),
        "no port may leave a mesh that is required"
    );
    plain["metadata"]["annotations"] = json!({});
    let (mut pod, _) = injected(&plain, &context(Mode::Required));
    assert_eq!(inject(&pod, &context(Mode::Required)).0, Outcome::Skip, "the genuine one, once more");
    pod["spec"]["initContainers"][1]["image"] = json!("pause:1");
    assert!(matches!(inject(&pod, &context(Mode::Required)).0, Outcome::Refuse(why) if why.contains(PROXY)));
    for (path, value) in [
        ("/spec/initContainers/0/args", json!(["init", "--skip-outbound-ports=5432"])),
        ("/spec/initContainers/1/env/0", json!({"name": "TULLE_OPERATOR", "value": "mine:26160"})),
        ("/spec/initContainers/1/volumeMounts", json!([])),
    ] {
        let (mut pod, _) = injected(&plain, &context(Mode::Required));
        *pod.pointer_mut(path).unwrap() = value;
        assert!(matches!(inject(&pod, &context(Mode::Required)).0, Outcome::Refuse(_)), "{path}");
    }
    let (mut defaulted, _) = injected(&plain, &context(Mode::Required));
    for variable in defaulted.pointer_mut("/spec/initContainers/1/env").unwrap().as_array_mut().unwrap() {
        if let Some(field) = variable.pointer_mut("/valueFrom/fieldRef") {
            field["apiVersion"] = json!("v1");
        }
    }
    defaulted["spec"]["initContainers"][1]["imagePullPolicy"] = json!("IfNotPresent");
    defaulted["spec"]["initContainers"][1]["volumeMounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "kube-api-access", "mountPath": "/var/run/secrets"}));
    assert_eq!(inject(&defaulted, &context(Mode::Required)).0, Outcome::Skip, "defaults of the API server");
    let bare = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}],
        "initContainers": [{"name": PROXY, "image": "pause:1", "restartPolicy": "Always"}]}});
    assert!(matches!(inject(&bare, &context(Mode::Required)).0, Outcome::Refuse(_)));
}

#[test]
fn a_sidecar_gets_the_operators_addresses_and_a_forged_one_is_refused() {
    let known = |mode| Context {
        operator_addresses: vec![
            SocketAddr::from(([10, 96, 7, 9], 26160)),
            SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, 7], 26160)),
        ],
        ..context(mode)
    };
    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}], "dnsPolicy": "Default"}});
    let (mut pod, warnings) = injected(&plain, &known(Mode::Required));
    assert_eq!(warnings, Vec::<String>::new(), "it needs no name server");
    let variable = pod["spec"]["initContainers"][1]["env"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .find(|variable| variable["name"] == "TULLE_OPERATOR_ADDRESSES")
        .unwrap();
    assert_eq!(variable["value"], "10.96.7.9:26160,[fd00::7]:26160");
    variable["value"] = json!("192.0.2.1:26160");
    assert!(
        matches!(inject(&pod, &known(Mode::Required)).0, Outcome::Refuse(why) if why.contains("ADDRESSES"))
    );

    let (pod, warnings) = injected(&plain, &context(Mode::Required));
    assert!(
        warnings[0].contains("spec.dnsPolicy is Default") && warnings[0].contains("dnsConfig"),
        "{warnings:?}"
    );
    assert_eq!(
        inject(&pod, &known(Mode::Required)).0,
        Outcome::Skip,
        "by a replica that knows them meanwhile"
    );
    let mut unsealed = pod;
    unsealed["metadata"]["annotations"] = json!({});
    assert_eq!(inject(&unsealed, &known(Mode::Required)).0, Outcome::Skip, "injected before they were known");
}

#[test]
fn fields_of_a_future_kubernetes_survive() {
    let (pod, _) = injected(&fixture("deployment"), &context(Mode::Enabled));
    assert_eq!(pod.pointer("/spec/futureField/inside"), Some(&json!([1, {"deep": true}])));
    assert_eq!(pod.pointer("/spec/containers/0/futureProbe"), Some(&json!({"quantum": {"port": 1}})));
}

#[test]
fn opting_out_works_where_the_sidecar_is_not_required() {
    let pod = json!({"metadata": {"labels": {"tulle.dev/inject": "disabled"}}, "spec": {"containers": [{"name": "a"}]}});
    assert_eq!(inject(&pod, &context(Mode::Enabled)).0, Outcome::Skip);
    let (pod, warnings) = injected(&pod, &context(Mode::Required));
    assert!(is_injected(&pod));
    assert!(warnings[0].contains("because namespace shop requires a sidecar"), "{warnings:?}");
}

#[test]
fn kubectl_chooses_the_only_container_without_a_note_and_the_authors_choice_stays() {
    let chosen = |pod: &Value| {
        let (pod, _) = injected(pod, &context(Mode::Enabled));
        pod["metadata"]["annotations"].get(DEFAULT_CONTAINER).cloned()
    };
    let one = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    assert_eq!(chosen(&one), Some(json!("a")));
    let two = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
    assert_eq!(chosen(&two), None, "kubectl names the containers without a sidecar too");
    let mut own = one;
    own["metadata"]["annotations"] = json!({DEFAULT_CONTAINER: "tulle-proxy"});
    assert_eq!(chosen(&own), Some(json!("tulle-proxy")));
}

#[test]
fn a_pod_on_the_nodes_network_is_left_alone_or_refused() {
    let pod = json!({"metadata": {}, "spec": {"hostNetwork": true, "containers": [{"name": "a"}]}});
    let (outcome, warnings) = inject(&pod, &context(Mode::Enabled));
    assert_eq!((outcome, warnings.len()), (Outcome::Skip, 1));
    assert!(
        matches!(inject(&pod, &context(Mode::Required)).0, Outcome::Refuse(why) if why.contains("hostNetwork"))
    );
}

#[test]
fn nobody_else_may_run_as_the_sidecars_user() {
    for spec in [
        json!({"containers": [{"name": "a", "securityContext": {"runAsUser": 4150}}]}),
        json!({"containers": [{"name": "a"}], "initContainers": [{"name": "b", "securityContext": {"runAsUser": 4150}}]}),
        json!({"containers": [{"name": "a"}], "securityContext": {"runAsUser": 4150}}),
    ] {
        let pod = json!({"metadata": {}, "spec": spec});
        assert!(matches!(inject(&pod, &context(Mode::Enabled)).0, Outcome::Refuse(_)), "{pod}");
    }
}

#[test]
fn pods_that_cannot_have_a_sidecar_are_left_alone_or_refused() {
    for (spec, word) in [
        (json!({"os": {"name": "windows"}, "containers": [{"name": "a"}]}), "Windows"),
        (json!({"containers": [{"name": "a"}, {"name": "istio-proxy"}]}), "another mesh"),
        (
            json!({"containers": [{"name": "a"}], "initContainers": [{"name": "linkerd-proxy"}]}),
            "another mesh",
        ),
    ] {
        let pod = json!({"metadata": {}, "spec": spec});
        let (outcome, warnings) = inject(&pod, &context(Mode::Enabled));
        assert!(outcome == Outcome::Skip && warnings[0].contains(word), "{warnings:?}");
        assert!(
            matches!(inject(&pod, &context(Mode::Required)).0, Outcome::Refuse(why) if why.contains(word))
        );
    }
}

#[test]
fn what_another_webhook_changes_in_the_sidecar_is_named_unless_it_is_harmless() {
    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    let (mut pod, _) = injected(&plain, &context(Mode::Required));
    let proxy = pod.pointer_mut("/spec/initContainers/1").unwrap();
    proxy["env"].as_array_mut().unwrap().push(json!({"name": "DD_AGENT_HOST", "value": "10.0.0.1"}));
    assert_eq!(inject(&pod, &context(Mode::Required)).0, Outcome::Skip, "a variable that nobody reads");
    pod.pointer_mut("/spec/initContainers/1").unwrap()["image"] = json!("mirror.example/sidecar:1");
    let Outcome::Refuse(why) = inject(&pod, &context(Mode::Required)).0 else { panic!("let in") };
    assert!(why.contains("container tulle-proxy has image \"mirror.example/sidecar:1\", expected"), "{why}");
}

#[test]
fn quotas_and_limit_ranges_can_be_met_by_both_containers() {
    let annotations =
        json!({"tulle.dev/cpu": "50m", "tulle.dev/cpu-limit": "500m", "tulle.dev/memory-limit": "64Mi"});
    let pod = json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "a"}]}});
    let (pod, warnings) = injected(&pod, &context(Mode::Enabled));
    let wanted =
        json!({"requests": {"cpu": "50m", "memory": "16Mi"}, "limits": {"cpu": "500m", "memory": "64Mi"}});
    for container in containers_at(&pod, "/spec/initContainers") {
        assert_eq!(container["resources"], wanted);
    }
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn mirror_pods_are_left_alone() {
    let pod = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "x"}}, "spec": {"containers": []}});
    assert_eq!(inject(&pod, &context(Mode::Required)).0, Outcome::Skip);
}

#[test]
fn annotations_that_are_unknown_or_malformed_are_named() {
    let pod = json!({"metadata": {"annotations": {
        "tulle.dev/skip-outbound-ports": "25,smtp", "tulle.dev/log-level": "loud", "tulle.dev/colour": "red",
        "tulle.dev/memory": "lots", "tulle.dev/workers": "0", "other.dev/x": "y",
    }}, "spec": {"containers": [{"name": "a"}]}});
    let (_, warnings) = injected(&pod, &context(Mode::Enabled));
    assert_eq!(warnings.len(), 5, "{warnings:?}");
    assert!(warnings.iter().any(|w| w
        == "annotation tulle.dev/skip-outbound-ports has no effect because \"25,smtp\" is not a list of ports; write for example 25,3306"));
}

#[test]
fn a_namespace_that_forbids_net_admin_is_named_in_a_warning() {
    let restricted = Context {
        namespace: Namespace { pod_security: Some("restricted".into()), ..Namespace::default() },
        ..context(Mode::Enabled)
    };
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    let (_, warnings) = injected(&pod, &restricted);
    assert!(warnings[0].contains("enforces Pod Security restricted"), "{warnings:?}");
}

#[test]
fn an_unapproved_revision_gets_the_gate_and_keeps_its_own() {
    let unapproved = Context { needs_approval: true, ..context(Mode::Enabled) };
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}], "readinessGates": [{"conditionType": "mine"}]}});
    let (pod, _) = injected(&pod, &unapproved);
    assert_eq!(
        pod.pointer("/spec/readinessGates"),
        Some(&json!([{"conditionType": "mine"}, {"conditionType": "tulle.dev/approved"}]))
    );
}

#[test]
fn probes_of_every_kind_are_moved_and_exec_is_not() {
    let pod = json!({"metadata": {}, "spec": {"containers": [{
        "name": "app",
        "ports": [{"name": "web", "containerPort": 8080}],
        "lifecycle": {"preStop": {"httpGet": {"path": "/drain", "port": "web"}}},
        "startupProbe": {"tcpSocket": {"port": "web"}, "periodSeconds": 3},
        "livenessProbe": {"exec": {"command": ["true"]}},
        "readinessProbe": {"httpGet": {"path": "ready", "port": "web", "httpHeaders": [{"name": "X", "value": "y"}]}, "timeoutSeconds": 4},
    }, {"name": "rpc", "readinessProbe": {"grpc": {"port": 9000, "service": "s"}}, "livenessProbe": {"httpGet": {"port": "nowhere"}},
        "startupProbe": {"tcpSocket": {"host": "db.example", "port": 5432}}}]}});
    let (pod, warnings) = injected(&pod, &context(Mode::Enabled));
    let app = pod.pointer("/spec/containers/0").unwrap();
    assert_eq!(
        app["startupProbe"],
        json!({"httpGet": {"path": "/app/startupProbe", "port": 26153, "scheme": "HTTP"}, "periodSeconds": 3})
    );
    assert_eq!(app["livenessProbe"], json!({"exec": {"command": ["true"]}}));
    assert_eq!(app["readinessProbe"]["httpGet"]["path"], "/app/readinessProbe");
    let proxy =
        containers_at(&pod, "/spec/initContainers").find(|container| name_of(container) == PROXY).unwrap();
    let env = proxy["env"].as_array().unwrap().iter().find(|env| env["name"] == "TULLE_PROBES").unwrap();
    let probes: Value = serde_json::from_str(env["value"].as_str().unwrap()).unwrap();
    assert_eq!(
        probes,
        json!([
            {"path": "/app/startupProbe", "check": {"tcp": {"port": 8080}}, "timeoutSeconds": 1},
            {"path": "/app/readinessProbe", "check": {"http": {"port": 8080, "path": "ready", "headers": [["X", "y"]], "tls": false}}, "timeoutSeconds": 4},
            {"path": "/rpc/readinessProbe", "check": {"grpc": {"port": 9000, "service": "s"}}, "timeoutSeconds": 1},
        ])
    );
    assert_eq!(
        warnings,
        [
            "preStop of container app is sent by kubelet without a certificate, so mtls: Strict and allow lists reject it; use an exec hook",
            "startupProbe of container rpc is not moved to the sidecar because it sets host",
            "livenessProbe of container rpc is not moved to the sidecar because the container has no port named nowhere",
        ]
    );
}

#[test]
fn a_pod_that_another_version_injected_or_whose_image_was_pinned_is_genuine() {
    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    let older = Context { image: "registry.example/sidecar:0.9".into(), ..context(Mode::Required) };
    let (pod, _) = injected(&plain, &older);
    assert_eq!(inject(&pod, &context(Mode::Required)).0, Outcome::Skip, "a replica of another version");
    let mut pinned = pod.clone();
    for at in [0, 1] {
        pinned["spec"]["initContainers"][at]["image"] =
            json!(format!("registry.example/sidecar:0.9@sha256:{}", "a".repeat(64)));
    }
    assert_eq!(inject(&pinned, &context(Mode::Required)).0, Outcome::Skip, "pinned by another webhook");
    let digest = |digit: &str| format!("registry.example/sidecar@sha256:{}", digit.repeat(64));
    let (mut other, _) = injected(&plain, &Context { image: digest("a"), ..context(Mode::Required) });
    assert_eq!(inject(&other, &context(Mode::Required)).0, Outcome::Skip, "installed by digest");
    other["spec"]["initContainers"][1]["image"] = json!(digest("b"));
    assert!(matches!(inject(&other, &context(Mode::Required)).0, Outcome::Refuse(_)), "another digest");
    for (what, path, value) in [
        ("another image", "/spec/initContainers/1/image", json!("registry.example/mine:0.9")),
        ("other arguments", "/spec/initContainers/0/args", json!(["init", "--skip-outbound-ports=5432"])),
        (
            "a seal of its own",
            "/metadata/annotations/tulle.dev~1injection",
            json!("v1 registry.example/sidecar:0.9 00"),
        ),
    ] {
        let mut forged = pod.clone();
        *forged.pointer_mut(path).unwrap() = value;
        assert!(matches!(inject(&forged, &context(Mode::Required)).0, Outcome::Refuse(_)), "{what}");
    }
    let elsewhere = Context { namespace: Namespace::default(), ..context(Mode::Required) };
    assert!(matches!(inject(&pod, &elsewhere).0, Outcome::Refuse(_)), "sealed for another namespace");
    let key = Context { key: SealKey::derive(b"of somebody else"), ..context(Mode::Required) };
    assert!(matches!(inject(&pod, &key).0, Outcome::Refuse(_)), "sealed by somebody else");
}

#[test]
fn a_pod_sealed_in_an_enabled_namespace_does_not_pass_in_a_required_one() {
    let skips = json!({"metadata": {"annotations": {"tulle.dev/skip-outbound-ports": "5432"}}, "spec": {"containers": [{"name": "a"}]}});
    let (pod, _) = injected(&skips, &context(Mode::Enabled));
    assert!(matches!(inject(&pod, &context(Mode::Required)).0, Outcome::Refuse(_)));
}

#[test]
fn windows_pods_are_known_by_every_way_to_ask_for_a_node() {
    let affinity = |values: Value| {
        json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "kubernetes.io/os", "operator": "In", "values": values}]}]}}})
    };
    for (spec, windows) in [
        (json!({"nodeSelector": {"kubernetes.io/os": "windows"}}), true),
        (json!({"nodeSelector": {"beta.kubernetes.io/os": "windows"}}), true),
        (json!({"nodeSelector": {"kubernetes.io/os": "linux"}}), false),
        (json!({"affinity": affinity(json!(["windows"]))}), true),
        (json!({"affinity": affinity(json!(["windows", "linux"]))}), false),
        (json!({}), false),
    ] {
        assert_eq!(is_windows(&json!({"spec": spec})), windows, "{spec}");
    }
}

#[test]
fn a_port_of_the_sidecar_that_a_pod_declares_or_probes_is_named() {
    let pod = json!({"metadata": {}, "spec": {"containers": [
        {"name": "queue", "ports": [{"containerPort": ports::OUTBOUND}]},
        {"name": "web", "livenessProbe": {"tcpSocket": {"port": ports::ADMIN}}},
        {"name": "fine", "ports": [{"containerPort": 4150}]},
    ]}});
    let (_, warnings) = injected(&pod, &context(Mode::Enabled));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("container queue uses port 26150"), "{warnings:?}");
    assert!(warnings[1].contains("container web uses port 26152"), "{warnings:?}");
}

#[test]
fn defaults_come_from_the_namespace_and_then_from_mesh_config() {
    let mut context = context(Mode::Enabled);
    context.defaults.resources.requests =
        [("cpu".to_owned(), "20m".to_owned()), ("memory".to_owned(), "24Mi".to_owned())].into();
    context.namespace.annotations = [
        ("tulle.dev/memory".to_owned(), "32Mi".to_owned()),
        ("tulle.dev/cpu-limit".to_owned(), "loads".to_owned()),
    ]
    .into();
    let pod = json!({"metadata": {"annotations": {"tulle.dev/log-level": "debug"}}, "spec": {"containers": [{"name": "a"}]}});
    let (pod, warnings) = injected(&pod, &context);
    assert_eq!(
        pod.pointer("/spec/initContainers/1/resources"),
        Some(&json!({"requests": {"cpu": "20m", "memory": "32Mi"}}))
    );
    assert_eq!(
        warnings,
        [
            "annotation tulle.dev/cpu-limit of namespace shop has no effect because \"loads\" is not a quantity above 0; write for example 100m or 32Mi"
        ]
    );
}

#[test]
fn the_ports_of_the_manifests_are_those_of_the_code() {
    let read = |name: &str| {
        std::fs::read_to_string(format!("{}/../config/base/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    };
    for (file, name, port) in [
        ("operator.yaml", "discovery", ports::DISCOVERY),
        ("operator.yaml", "health", ports::HEALTH),
        ("webhook.yaml", "https", ports::WEBHOOK),
        ("webhook.yaml", "health", ports::HEALTH),
    ] {
        assert!(read(file).contains(&format!("{{name: {name}, containerPort: {port}}}")), "{file}: {name}");
    }
    let policy = read("network-policy.yaml");
    for name in ["discovery", "https", "health"] {
        assert!(policy.contains(&format!("{{port: {name}, protocol: TCP}}")), "{name}");
    }
    assert!(read("admission.yaml").contains(&format!("uid {}", ports::PROXY_UID)));
}

#[test]
fn the_webhook_of_updates_blocks_no_update_and_sees_only_injected_pods() {
    let path = format!("{}/../config/base/admission.yaml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let mutating = text.split("\n---\n").next().unwrap();
    let configuration: Value = serde_yaml::from_str(mutating).unwrap();
    let hooks = configuration["webhooks"].as_array().unwrap();
    let (updates, creations): (Vec<&Value>, Vec<&Value>) =
        hooks.iter().partition(|hook| hook["rules"][0]["operations"] == json!(["UPDATE"]));
    assert!(creations.iter().all(|hook| hook["rules"][0]["operations"] == json!(["CREATE"])));
    let [update] = updates[..] else { panic!("{updates:?}") };
    assert_eq!(update["failurePolicy"], "Ignore");
    assert_eq!(update["rules"][0]["resources"], json!(["pods"]), "no subresource");
    assert_eq!(
        update["objectSelector"],
        json!({"matchExpressions": [{"key": keys::INJECTED, "operator": "Exists"}]})
    );
    assert_eq!(update["clientConfig"]["service"]["path"], "/update");
}

#[test]
fn a_sealed_sidecar_whose_program_or_rights_were_changed_is_forged() {
    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    let (pod, _) = injected(&plain, &context(Mode::Required));
    for (path, value) in [
        ("volumeMounts/-", json!({"name": "mine", "mountPath": "/program", "subPath": "p"})),
        ("volumeMounts/-", json!({"name": "mine", "mountPath": "/var/run/"})),
        ("livenessProbe", json!({"exec": {"command": ["/x"]}})),
        ("lifecycle", json!({"postStart": {"exec": {"command": ["/x"]}}})),
        ("securityContext/privileged", json!(true)),
        ("securityContext/capabilities/add", json!(["SYS_ADMIN"])),
    ] {
        let mut forged = pod.clone();
        let add: Result<Patch, _> = serde_json::from_value(
            json!([{"op": "add", "path": format!("/spec/initContainers/1/{path}"), "value": value}]),
        );
        patch(&mut forged, &add.unwrap()).unwrap();
        assert!(matches!(inject(&forged, &context(Mode::Required)).0, Outcome::Refuse(_)), "{path}");
    }
    let mut harmless = pod;
    let mounts = harmless.pointer_mut("/spec/initContainers/1/volumeMounts").unwrap().as_array_mut().unwrap();
    mounts.push(json!({"name": "certificates", "mountPath": "/etc/ssl"}));
    assert_eq!(inject(&harmless, &context(Mode::Required)).0, Outcome::Skip);
}

#[test]
fn a_pod_that_was_copied_without_its_sidecar_is_injected_anew() {
    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a", "livenessProbe": {"httpGet": {"port": 8080}}}]}});
    let (mut copy, _) = injected(&plain, &context(Mode::Enabled));
    copy["spec"].as_object_mut().unwrap().remove("initContainers");
    let (again, warnings) = injected(&copy, &context(Mode::Enabled));
    assert_eq!(names(&again, "volumes").len(), 2, "each volume once");
    assert_eq!(again.pointer("/spec/containers/0/livenessProbe"), None, "it would fail for ever");
    assert!(warnings.iter().any(|w| w.contains("livenessProbe of container a is removed")), "{warnings:?}");
}

#[test]
fn a_copy_whose_labels_were_dropped_gets_the_sidecars_label_again() {
    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    for mode in [Mode::Enabled, Mode::Required] {
        let (mut copy, _) = injected(&plain, &context(mode));
        copy["metadata"].as_object_mut().unwrap().remove("labels");
        let (labelled, _) = injected(&copy, &context(mode));
        assert_eq!(labelled["metadata"]["labels"], json!({"tulle.dev/sidecar": env!("CARGO_PKG_VERSION")}));
        assert_eq!(labelled["spec"], copy["spec"]);
        copy["spec"]["initContainers"][1]["image"] = json!("tulle/sidecar:older");
        if mode == Mode::Enabled {
            let (labelled, _) = injected(&copy, &context(mode));
            assert_eq!(labelled["metadata"]["labels"], json!({"tulle.dev/sidecar": "unknown"}));
        }
    }
}

#[test]
fn a_sidecar_on_the_nodes_network_is_refused() {
    let (mut pod, _) = injected(&fixture("deployment"), &context(Mode::Enabled));
    pod["spec"]["hostNetwork"] = json!(true);
    assert!(
        matches!(inject(&pod, &context(Mode::Enabled)).0, Outcome::Refuse(why) if why.contains("hostNetwork"))
    );
}

fn preserving() -> Value {
    json!({"metadata": {"annotations": {"tulle.dev/source-address": "preserve"}}, "spec": {"containers": [{"name": "a"}]}})
}

#[test]
fn a_pod_that_wants_its_clients_addresses_gets_one_capability_and_a_warning_that_names_it() {
    let (pod, warnings) = injected(&preserving(), &context(Mode::Enabled));
    assert_eq!(
        pod.pointer("/spec/initContainers/0/args"),
        Some(&json!(["init", "--preserve-source-address"]))
    );
    let proxy = pod.pointer("/spec/initContainers/1").unwrap();
    let security = &proxy["securityContext"];
    assert_eq!(security["capabilities"], json!({"drop": ["ALL"], "add": ["NET_RAW"]}));
    assert_eq!(security["allowPrivilegeEscalation"], true);
    assert_eq!((&security["runAsUser"], &security["privileged"]), (&json!(4150), &json!(false)));
    let variable = json!({"name": "TULLE_SOURCE_ADDRESS", "value": "preserve"});
    assert!(proxy["env"].as_array().unwrap().contains(&variable));
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("NET_RAW") && warnings[0].contains("source-address"), "{warnings:?}");
}

#[test]
fn other_pods_get_no_capability_for_it() {
    let mut with_default = context(Mode::Enabled);
    with_default.namespace.annotations =
        [("tulle.dev/source-address".to_owned(), "preserve".to_owned())].into();
    for (value, context, preserves) in [
        (None, context(Mode::Enabled), false),
        (Some("sidecar"), context(Mode::Enabled), false),
        (Some("yes"), context(Mode::Enabled), false),
        (Some("sidecar"), with_default.clone(), false),
        (None, with_default, true),
    ] {
        let mut pod = json!({"metadata": {"annotations": {}}, "spec": {"containers": [{"name": "a"}]}});
        if let Some(value) = value {
            pod["metadata"]["annotations"]["tulle.dev/source-address"] = json!(value);
        }
        let (pod, warnings) = injected(&pod, &context);
        let security = pod.pointer("/spec/initContainers/1/securityContext").unwrap();
        assert_eq!(security["capabilities"].get("add").is_some(), preserves, "{value:?}");
        assert_eq!(security["allowPrivilegeEscalation"], preserves, "{value:?}");
        assert_eq!(pod.to_string().contains("preserve-source-address"), preserves, "{value:?}");
        let named = warnings.iter().any(|w| w.contains("write preserve or sidecar"));
        assert_eq!(named, value == Some("yes"), "{warnings:?}");
    }
}

#[test]
fn a_required_sidecar_may_have_the_capability_only_as_it_was_injected() {
    let (pod, _) = injected(&preserving(), &context(Mode::Required));
    assert_eq!(inject(&pod, &context(Mode::Required)).0, Outcome::Skip, "the genuine one, once more");
    let refused = |pod: &Value| matches!(inject(pod, &context(Mode::Required)).0, Outcome::Refuse(_));
    let set = |pod: &Value, path: &str, value: Value| {
        let mut pod = pod.clone();
        *pod.pointer_mut(path).unwrap() = value;
        pod
    };
    let security = "/spec/initContainers/1/securityContext";
    let more = set(&pod, &format!("{security}/capabilities/add"), json!(["NET_RAW", "NET_ADMIN"]));
    assert!(refused(&more), "another capability");
    let init = set(&pod, "/spec/initContainers/0/securityContext/capabilities/add", json!(["NET_RAW"]));
    assert!(refused(&init), "the other container");
    let arguments = set(&pod, "/spec/initContainers/0/args", json!(["init"]));
    assert!(refused(&arguments), "without the routes");

    let plain = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}]}});
    let (plain, _) = injected(&plain, &context(Mode::Required));
    let capabilities = json!({"drop": ["ALL"], "add": ["NET_RAW"]});
    assert!(refused(&set(&plain, &format!("{security}/capabilities"), capabilities)));
    assert!(refused(&set(&plain, &format!("{security}/allowPrivilegeEscalation"), json!(true))));
    let mut variable = plain;
    let env = variable.pointer_mut("/spec/initContainers/1/env").unwrap().as_array_mut().unwrap();
    env.push(json!({"name": "TULLE_SOURCE_ADDRESS", "value": "preserve"}));
    assert!(refused(&variable), "a variable that was added later");
}
