//! What a route makes of sections of policies, and rules that are not in force as they are written.

use super::*;

/// Why a stage of `GET /` from `shop/cart` to `shop/web` decides as it does.
fn because(model: &Model, name: &str) -> String {
    stage(&ask(model, &question("/")), name).because.clone()
}

/// `shop/web` leads to `shop/api`, and this policy holds.
fn led_to_api(policy: MeshPolicy) -> String {
    let mut model = world();
    apply_route(&mut model, json!([{"backendRefs": [to("api", 1)]}]));
    apply(&mut model, policy);
    because(&model, "backend")
}

#[test]
fn sections_of_a_backend_that_do_not_hold_for_who_dials_another_service_are_named() {
    let of_api = |mut sections: Value| {
        sections["target"] = json!({"kind": "Service", "name": "api"});
        led_to_api(policy("back", sections))
    };
    let timeout = json!({"request": "2s"});
    let said = of_api(json!({"timeout": timeout, "balance": {"by": "RoundRobin"}}));
    for part in [
        "balanced round robin (MeshPolicy/shop/back)",
        "timeout of MeshPolicy/shop/back does not hold, because the client dials Service shop/web: set it in a MeshPolicy for that Service",
        "in the rule of the route",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let said = of_api(json!({"timeout": timeout, "retry": {"on": ["5xx"], "attempts": 1}}));
    let both = "timeout of MeshPolicy/shop/back, retry of MeshPolicy/shop/back do not hold";
    assert!(said.contains(both), "{said}");
    let said = of_api(json!({"breaker": {"consecutiveFailures": 3}}));
    assert!(said.contains("breaker") && !said.contains("not hold"), "{said}");
}

#[test]
fn sections_that_hold_for_the_dialled_service_too_are_not_said_not_to() {
    let everywhere = json!({"target": {"kind": "Namespace"}, "timeout": {"request": "2s"}});
    let said = led_to_api(policy("all", everywhere));
    assert!(said.contains("timeout request 2s (MeshPolicy/shop/all)"), "{said}");
    assert!(!said.contains("not hold"), "{said}");
    let mut model = world();
    apply_route(&mut model, json!([{"backendRefs": [to("web", 1)]}]));
    apply(&mut model, web("own", json!({"timeout": {"request": "2s"}})));
    assert!(!because(&model, "backend").contains("not hold"));
}

#[test]
fn a_rule_that_answers_with_an_error_is_explained_by_its_flaw_and_one_that_is_left_out_is_named() {
    let rewrite = json!({"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/f?x=1"}}});
    let bad_match = json!({"path": {"type": "RegularExpression", "value": "("}});
    let good = json!({"matches": [{"path": {"value": "/good"}}], "backendRefs": [to("web", 1)]});
    let mut model = world();
    apply_route(
        &mut model,
        json!([
            {"matches": [bad_match], "backendRefs": [to("web", 1)]},
            good,
            {"filters": [rewrite], "backendRefs": [to("web", 1)]},
        ]),
    );
    let explained = ask(&model, &question("/"));
    let found = stage(&explained, "backend");
    assert_eq!(found.verdict, Verdict::Stop);
    for part in ["rules[2]: filter URLRewrite: path \"/f?x=1\" contains ?", ": its requests are answered 500"]
    {
        assert!(found.because.contains(part), "{part}: {found:?}");
    }
    assert!(explained.outcome.contains("answers 500 (RouteNoBackend)"), "{explained:?}");
    let found = stage(&explained, "route");
    let left_out = "left out of HTTPRoute/shop/r: rules[0]: ";
    assert!(found.because.contains(left_out) && !found.because.contains("rules[2]: "), "{found:?}");
    // Where no rule takes it, too.
    apply_route(&mut model, json!([{"matches": [bad_match]}, good]));
    let nobody = because(&model, "route");
    assert!(nobody.contains("rules[1] wants path below /good") && nobody.contains(left_out), "{nobody}");
    apply_route(&mut model, json!([{"backendRefs": []}]));
    assert_eq!(because(&model, "backend"), "the rule has no backend with a weight");
}
