//! Sections of a `/config` as sidecars write it.

use serde_json::{Value, json};
use tulle_mesh::query::Sidecar;

use super::difference::lines;
use super::{Args, pod_name, sections};

fn config() -> Value {
    json!({
        "version": "0.5.0", "pod": "shop/front-1", "identity": "spiffe://cluster.local/ns/shop/sa/front",
        "certificateNotAfter": 8_200, "operatorConnected": true,
        "inbound": {
            "mtls": "Permissive", "revision": "a", "accessPolicy": "shop/front", "shadowPolicy": null,
            "limits": {"enforced": {"concurrency": {"max": 64, "policy": "shop/calm", "inUse": 1}}, "shadow": {}},
        },
        "destinations": [
            {"address": "10.0.0.7:80", "leadsTo": {
                "service": "shop/web:80", "protocol": "Http1", "policies": {"timeout": {"request": "2s"}},
                "ejected": [{"address": "10.1.0.2:8080", "threads": 1}],
                "rules": [{"route": "HTTPRoute/shop/web", "rule": "all", "timeout": {"request": "1s"}}],
                "backends": [],
                "endpoints": [
                    {"address": "10.1.0.1:8080", "identity": "spiffe://x", "revision": "old", "terminating": false},
                    {"address": "10.1.0.2:8080", "identity": null, "revision": "new", "terminating": false},
                ],
                "split": [{"revision": "new", "permille": 50}], "canary": "shop/web, epoch 3",
            }},
            {"address": "10.1.0.9:5432", "leadsTo": {"pod": {"address": "10.1.0.9:5432"}, "protocol": "Opaque"}},
            {"address": "1.1.1.1:443", "leadsTo": "nobody in the cluster: passed through"},
        ],
    })
}

#[test]
fn services_are_shown_with_what_their_address_leads_to() {
    let expected = "\
ADDRESS         LEADS-TO                                PROTOCOL   ENDPOINTS   EJECTED   SPLIT    CANARY
10.0.0.7:80     shop/web:80                             Http1      2           1         new 5%   shop/web, epoch 3
10.1.0.9:5432   pod 10.1.0.9:5432                       Opaque     -           -         -        -
1.1.1.1:443     nobody in the cluster: passed through   -          -           -         -        -
";
    assert_eq!(sections::services(&config()).to_string(), expected);
}

#[test]
fn routes_are_shown_by_service() {
    let expected = "\
SERVICE       ROUTE                RULE   TIMEOUT         RETRY
shop/web:80   HTTPRoute/shop/web   all    {request: 1s}   -
";
    assert_eq!(sections::routes(&config()).to_string(), expected);
}

#[test]
fn policies_are_shown_for_both_directions() {
    let expected = "\
OF            MODE      SECTION              VALUE
inbound       Enforce   mtls                 Permissive
inbound       Enforce   access               shop/front
inbound       Enforce   limits.concurrency   {inUse: 1, max: 64, policy: shop/calm}
shop/web:80   Enforce   timeout              {request: 2s}
";
    assert_eq!(sections::policies(&config()).to_string(), expected);
}

#[test]
fn endpoints_are_shown_with_their_state() {
    let expected = "\
SERVICE       ADDRESS         REVISION   STATE     IDENTITY
shop/web:80   10.1.0.1:8080   old        in use    spiffe://x
shop/web:80   10.1.0.2:8080   new        ejected   -
";
    assert_eq!(sections::endpoints(&config()).to_string(), expected);
}

#[test]
fn the_certificate_is_shown_without_anything_secret() {
    let table = sections::certificate(&config(), 1_000);
    assert_eq!(table.rows[0], ["spiffe://cluster.local/ns/shop/sa/front", "120m", "connected", "0.5.0"]);
    let json = sections::objects(&table);
    assert_eq!(json[0]["certLeft"], "120m");
    assert_eq!(json[0]["identity"], "spiffe://cluster.local/ns/shop/sa/front");
}

#[test]
fn a_sidecar_that_knows_nothing_yet_has_empty_tables() {
    let empty = json!({"inbound": null, "destinations": []});
    for table in [sections::services(&empty), sections::routes(&empty), sections::policies(&empty)] {
        assert_eq!(table.rows, Vec::<Vec<String>>::new());
    }
    assert_eq!(sections::certificate(&empty, 0).rows[0], ["-", "-", "not connected", "-"]);
}

#[test]
fn a_difference_between_sidecar_and_operator_is_seen_and_refusals_are_listed() {
    let known = Sidecar {
        version: "0.5.0".into(),
        connected: true,
        acknowledged: 11,
        resources: 12,
        behind_seconds: Some(42),
        refused: vec!["MeshPolicy/shop/calm: no".into()],
        certificate_not_after: Some(8_200),
        ..Sidecar::default()
    };
    let found = lines(&config(), &known, 1_000);
    let same: Vec<(&str, bool)> = found.iter().map(|line| (line.what.as_str(), line.same)).collect();
    let expected = [
        ("version", true),
        ("stream", true),
        ("certificate", true),
        ("resources", false),
        ("refused", false),
    ];
    assert_eq!(same, expected);
    assert_eq!(found[3].operator, "12 sent, the oldest waits for 42 s");
    assert_eq!(found[4].sidecar, "MeshPolicy/shop/calm: no");
}

#[test]
fn a_pod_may_be_named_as_kubectl_names_it() {
    for text in ["web-1", "pod/web-1", "pods/web-1", "po/web-1"] {
        assert_eq!(pod_name(text), Ok("web-1".to_owned()), "{text}");
    }
    for text in ["deploy/web", "pod/", ""] {
        assert!(pod_name(text).is_err(), "{text}");
    }
    assert!(pod_name("shop/web-1").unwrap_err().ends_with("as -n NAMESPACE"));
}

#[test]
fn a_comparison_is_of_all_sections() {
    let command = <Args as clap::Args>::augment_args(clap::Command::new("config"));
    let read = |line: &[&str]| command.clone().try_get_matches_from(line).map(drop).map_err(|e| e.kind());
    assert_eq!(read(&["config", "web-1", "--diff"]), Ok(()));
    assert_eq!(read(&["config", "web-1", "routes"]), Ok(()));
    let refused = Err(clap::error::ErrorKind::ArgumentConflict);
    assert_eq!(read(&["config", "web-1", "routes", "--diff"]), refused);
}
