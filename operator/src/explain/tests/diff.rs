//! What a policy would deny.

use super::*;

fn denied(model: &Model, policy: &MeshPolicy) -> Vec<(String, String, u64)> {
    let rows = diff(model, &last_hour(), policy).rows.into_iter();
    let name = |row: &tulle_mesh::query::DiffRow| match row.edge.mtls {
        true => row.edge.source.name.clone(),
        false => row.edge.source.kind.clone(),
    };
    rows.map(|row| (name(&row), row.verdict, row.edge.golden.requests)).collect()
}

#[test]
fn a_diff_lists_what_a_policy_would_deny_and_what_depends_on_the_request() {
    let model = world();
    let row = |name: &str, verdict: &str, requests| (name.to_owned(), verdict.to_owned(), requests);
    for (sections, expected) in [
        (json!({"mtls": "Strict"}), vec![row("Plain", "denied", 7)]),
        (json!({"mtls": "Permissive"}), vec![]),
        (
            json!({"access": {"allow": [{"from": [{"serviceAccount": "cart"}]}]}}),
            vec![row("admin", "denied", 36), row("Plain", "denied", 7)],
        ),
        (
            json!({"access": {"deny": [{"from": [{"serviceAccount": "cart"}], "to": [{"methods": ["PUT"]}]}]}}),
            vec![row("cart", "depends", 360)],
        ),
        (
            json!({"access": {"allow": [{"from": [{"namespace": "shop"}]}, {"from": [{"cidr": "10.0.0.0/8"}]}]}}),
            vec![row("Plain", "depends", 7)],
        ),
    ] {
        let policy = web("p", sections.clone());
        assert_eq!(denied(&model, &policy), expected, "{sections}");
        assert_eq!(diff(&model, &last_hour(), &policy).pods, 1, "{sections}");
    }
}

#[test]
fn a_policy_that_another_one_overrules_would_deny_nothing() {
    let mut model = world();
    apply(&mut model, web("older", json!({"access": {"deny": []}})));
    let nobody = json!({"access": {"allow": []}});
    let same = diff(&model, &last_hour(), &web("younger", nobody.clone()));
    assert_eq!((same.pods, same.rows.len()), (0, 0), "the older holds");
    let wide = policy("wide", json!({"target": {"kind": "Namespace"}, "access": {"allow": []}}));
    let of_web = |row: &tulle_mesh::query::DiffRow| row.edge.destination.name == "web";
    assert!(!diff(&model, &last_hour(), &wide).rows.iter().any(of_web), "the narrower holds");
    assert_eq!(diff(&model, &last_hour(), &web("older", nobody)).rows.len(), 3, "its own next version");
}

#[test]
fn a_policy_that_is_refused_overrules_only_by_what_holds_instead_of_it() {
    let refused = json!({"mtls": "Permissive", "access": {"deny": [{"from": [{"cidr": "10.0.0.0/99"}]}]}});
    let nobody = web("younger", json!({"access": {"allow": []}}));
    // It was never valid: it admits nobody, and its section mtls is not in force.
    let mut model = world();
    apply(&mut model, web("refused", refused.clone()));
    let plain = ("Plain".to_owned(), "denied".to_owned(), 7);
    assert_eq!(denied(&model, &web("younger", json!({"mtls": "Strict"}))), [plain]);
    assert_eq!(diff(&model, &last_hour(), &nobody).pods, 0, "the older admits nobody already");
    // Its last valid version has no section access.
    let mut model = world();
    apply(&mut model, web("refused", json!({"mtls": "Permissive"})));
    apply(&mut model, web("refused", refused));
    assert_eq!(diff(&model, &last_hour(), &nobody).rows.len(), 3);
    assert!(denied(&model, &web("younger", json!({"mtls": "Strict"}))).is_empty(), "the older holds");
}
