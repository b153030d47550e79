//! What sidecars are sent of a rule, and what becomes of one that cannot be in force as it is written.

use tulle_mesh::proto::filter::Kind;
use tulle_mesh::proto::value_match::Type;
use tulle_mesh::proto::{
    Backend, Cors, Header, HeaderEdits, Mirror, PathModifier, Protocol, Redirect, Rewrite, RouteRule, Rules,
    ValueMatch, path_modifier, session_persistence,
};

use super::*;

/// A route `shop/r` of `shop/web` with these rules.
fn with_rules(kind: RouteKind, rules: Value) -> RouteObject {
    route_of(kind, "shop/r", json!({"parentRefs": [web(json!({}))], "rules": rules}))
}

fn compiled(kind: RouteKind, rules: Value) -> Rules {
    let mut model = world();
    model.apply_route(with_rules(kind, rules));
    rules_at(&model, VIP, "shop").unwrap()
}

/// The only rule.
fn rule(rule: Value) -> RouteRule {
    compiled(RouteKind::Http, json!([rule])).rules.remove(0)
}

/// The only rule's filters.
fn filters(filters: Value) -> Vec<Kind> {
    let made = rule(json!({"filters": filters, "matches": [{"path": {"value": "/a"}}]}));
    made.filters.into_iter().filter_map(|filter| filter.kind).collect()
}

fn path(kind: path_modifier::Kind) -> Option<PathModifier> {
    Some(PathModifier { kind: Some(kind) })
}

fn header(name: &str, value: &str) -> Header {
    Header { name: name.into(), value: value.into() }
}

fn backend(backend: Value) -> (Backend, &'static str) {
    let mut model = world();
    model.apply_service(key("team", "far"), service("10.96.0.3", &[("http", 80, Some("kubernetes.io/h2c"))]));
    model.apply_service(key("shop", "tls"), service("10.96.0.4", &[("https", 443, Some("https"))]));
    let headless =
        Service { headless: true, cluster_ips: Vec::new(), ..service("10.96.0.5", &[("http", 80, None)]) };
    model.apply_service(key("shop", "alias"), Service { headless: false, ..headless.clone() });
    model.apply_service(key("shop", "headless"), headless);
    let route = with_rules(RouteKind::Http, json!([{"backendRefs": [backend]}]));
    model.apply_route(route.clone());
    let (accepted, _, resolved) = verdict(&model, &route);
    assert!(accepted, "a backend that cannot be used does not make a route invalid");
    (rules_at(&model, VIP, "shop").unwrap().rules.remove(0).backends.remove(0), resolved)
}

#[test]
fn a_rule_without_matches_takes_everything() {
    let http = compiled(RouteKind::Http, json!([{}]));
    let root = ValueMatch { r#type: Type::Prefix.into(), name: String::new(), value: "/".into() };
    assert_eq!((http.matches.len(), &http.matches[0].path), (1, &Some(root)));
    let grpc = compiled(RouteKind::Grpc, json!([{}]));
    assert_eq!(grpc.matches, [proto::Match::default()]);
    let tcp = compiled(RouteKind::Tcp, json!([{"backendRefs": [{"name": "api", "port": 80}]}]));
    assert_eq!(
        (tcp.matches, tcp.rules[0].backends[0].protocol()),
        (vec![proto::Match::default()], Protocol::Opaque)
    );
}

#[test]
fn a_tls_rule_is_matched_by_the_server_names_of_its_route() {
    let mut model = world();
    let spec =
        json!({"parentRefs": [web(json!({}))], "hostnames": ["a.example", "*.b.example"], "rules": [{}]});
    model.apply_route(route_of(RouteKind::Tls, "shop/r", spec.clone()));
    let rules = rules_at(&model, VIP, "shop").unwrap();
    assert_eq!(rules.matches[0].server_names, ["a.example", "*.b.example"]);
    model.delete_route(&route_of(RouteKind::Tls, "shop/r", spec.clone()).key());
    model.apply_route(route_of(RouteKind::Http, "shop/r", spec));
    let rules = rules_at(&model, VIP, "shop").unwrap();
    assert!(rules.matches[0].server_names.is_empty(), "those of an HTTPRoute mean nothing in a mesh");
}

#[test]
fn matches_are_sent_as_they_are_written_and_of_equal_names_the_first() {
    let rules = compiled(
        RouteKind::Http,
        json!([{"matches": [{
            "path": {"type": "Exact", "value": "/a"}, "method": "GET",
            "headers": [{"name": "X-A", "value": "1"}, {"name": "x-a", "value": "2"}, {"type": "RegularExpression", "name": "b", "value": "c+"}],
            "queryParams": [{"name": "q", "value": "1"}, {"name": "Q", "value": "2"}],
        }]}]),
    );
    let value = |kind: Type, name: &str, value: &str| ValueMatch {
        r#type: kind.into(),
        name: name.into(),
        value: value.into(),
    };
    let one = &rules.matches[0];
    assert_eq!(one.path, Some(value(Type::Exact, "", "/a")));
    assert_eq!(one.headers, [value(Type::Exact, "X-A", "1"), value(Type::Regex, "b", "c+")]);
    assert_eq!(one.query, [value(Type::Exact, "q", "1"), value(Type::Exact, "Q", "2")]);
    assert_eq!(one.method, "GET");
    let method = json!({"service": "shop.Orders", "method": "Get"});
    let grpc = compiled(RouteKind::Grpc, json!([{"matches": [{"method": method}]}]));
    assert_eq!(grpc.matches[0].grpc_service, Some(value(Type::Exact, "", "shop.Orders")));
    assert_eq!(grpc.matches[0].grpc_method, Some(value(Type::Exact, "", "Get")));
}

#[test]
fn a_rule_that_cannot_be_decided_is_dropped_and_the_others_hold() {
    for bad in [
        json!({"path": {"type": "RegularExpression", "value": "("}}),
        json!({"headers": [{"type": "RegularExpression", "name": "x", "value": "("}]}),
        json!({"path": {"type": "Glob", "value": "/*"}}),
        json!({"headers": [{"type": "Present", "name": "x", "value": ""}]}),
        json!({"method": "BREW"}),
    ] {
        let good = json!({"name": "good", "matches": [{"path": {"value": "/good"}}]});
        let both = with_rules(RouteKind::Http, json!([{"name": "bad", "matches": [{}, bad]}, good]));
        let mut model = world();
        model.apply_route(both.clone());
        let rules = rules_at(&model, VIP, "shop").unwrap();
        assert_eq!((rules.rules.len(), rules.rules[0].name.as_str()), (1, "good"), "{bad}");
        assert_eq!(verdict(&model, &both), GOOD, "{bad}");
        let message = status(&model, &both)[0].partially_invalid.clone().unwrap();
        assert!(message.starts_with("Dropped Rule rules[0]: "), "{message}");
        assert!(message.ends_with(": its requests go to other rules, and get 404 where none takes them"));
        // Alone it takes nothing from the Service.
        let alone = with_rules(RouteKind::Http, json!([{"matches": [bad]}]));
        model.apply_route(alone.clone());
        assert_eq!(rules_at(&model, VIP, "shop"), None, "{bad}");
        assert_eq!(verdict(&model, &alone), (false, "UnsupportedValue", "ResolvedRefs"), "{bad}");
        assert_eq!(status(&model, &alone)[0].partially_invalid, None, "{bad}");
        let message = &status(&model, &alone)[0].accepted.message;
        assert!(message.ends_with(": all is as it would be without this route"), "{message}");
    }
}

#[test]
fn a_match_of_a_header_that_sidecars_do_not_see_is_refused_by_its_name() {
    for name in ["Connection", "TE", "Transfer-Encoding", "content-length", "Expect", "Keep-Alive"] {
        let headers = json!([{"name": "x", "value": "y"}, {"name": name, "value": "y"}]);
        let alone = with_rules(RouteKind::Http, json!([{"matches": [{"headers": headers}]}]));
        let mut model = world();
        model.apply_route(alone.clone());
        assert_eq!(verdict(&model, &alone), (false, "UnsupportedValue", "ResolvedRefs"), "{name}");
        let message = status(&model, &alone)[0].accepted.message.clone();
        assert!(message.contains(&format!("header {name} ")), "{message}");
    }
    // A query parameter may be called anything, and these arrive with the request.
    for good in [
        json!({"queryParams": [{"name": "te", "value": "y"}]}),
        json!({"headers": [{"name": "Proxy-Authorization", "value": "y"}, {"name": "Upgrade", "value": "y"}]}),
    ] {
        let route = with_rules(RouteKind::Http, json!([{"matches": [good]}]));
        let mut model = world();
        model.apply_route(route.clone());
        assert_eq!(verdict(&model, &route), GOOD, "{good}");
    }
}

#[test]
fn what_would_pass_an_unsupported_filter_is_answered_with_an_error() {
    let to_api = json!([{"name": "api", "port": 80}]);
    for filter in ["ExtensionRef", "ExternalAuth", "Teleport"] {
        let bad =
            json!({"filters": [{"type": filter}], "backendRefs": to_api, "timeouts": {"request": "1s"}});
        let route = with_rules(RouteKind::Http, json!([bad]));
        let mut model = world();
        model.apply_route(route.clone());
        let rules = rules_at(&model, VIP, "shop").unwrap();
        assert_eq!(rules.rules, [RouteRule::default()], "{filter}");
        assert_eq!(rules.matches.len(), 1);
        assert_eq!(verdict(&model, &route), (false, "UnsupportedValue", "ResolvedRefs"));
        let message = &status(&model, &route)[0].accepted.message;
        assert!(message.contains(filter), "{message}");
        assert!(message.ends_with(": its requests are answered 500"), "{message}");
        let both = with_rules(RouteKind::Http, json!([{"matches": [{"path": {"value": "/good"}}]}, bad]));
        model.apply_route(both.clone());
        assert_eq!(verdict(&model, &both), GOOD);
        let message = status(&model, &both)[0].partially_invalid.clone().unwrap();
        assert!(message.starts_with("Dropped Rule rules[1]: ") && message.contains(filter), "{message}");
        assert_eq!(rules_at(&model, VIP, "shop").unwrap().rules.len(), 2);
        let on_backend =
            json!([{"backendRefs": [{"name": "api", "port": 80, "filters": [{"type": filter}]}]}]);
        assert!(compiled(RouteKind::Http, on_backend).rules[0].backends.is_empty());
    }
    let cors = json!([{"filters": [{"type": "CORS", "cors": {}}], "backendRefs": to_api}]);
    assert!(compiled(RouteKind::Grpc, cors).rules[0].backends.is_empty(), "not of a GRPCRoute");
}

#[test]
fn values_that_would_break_a_message_or_that_mean_nothing_are_refused() {
    let edit = |edits: Value| json!([{"type": "RequestHeaderModifier", "requestHeaderModifier": edits}]);
    let redirect = |redirect: Value| json!([{"type": "RequestRedirect", "requestRedirect": redirect}]);
    for filters in [
        edit(json!({"set": [{"name": "x", "value": "1\r\nhost: evil"}]})),
        edit(json!({"add": [{"name": "x y", "value": "1"}]})),
        edit(json!({"remove": ["Content-Length"]})),
        edit(json!({"add": [{"name": "Host", "value": "a"}]})),
        edit(json!({"remove": ["host"]})),
        edit(json!({"set": [{"name": "Tulle-Client-Id", "value": "a"}]})),
        edit(json!({"set": [{"name": "x", "value": "ä"}]})),
        redirect(json!({"scheme": "ftp"})),
        redirect(json!({"statusCode": 304})),
        redirect(json!({"hostname": "a b"})),
        redirect(json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a\r\nx: y"}})),
        redirect(json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a?b"}})),
        redirect(json!({"path": {"type": "ReplaceLastSegment"}})),
        json!([{"type": "CORS", "cors": {"allowOrigins": ["a\nb"]}}]),
        json!([{"type": "URLRewrite"}]),
        json!([{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "api", "port": 80}, "fraction": {"numerator": 1, "denominator": 0}}}]),
    ] {
        let route = with_rules(RouteKind::Http, json!([{"filters": filters}]));
        let mut model = world();
        model.apply_route(route.clone());
        assert_eq!(verdict(&model, &route), (false, "UnsupportedValue", "ResolvedRefs"), "{filters}");
        assert!(rules_at(&model, VIP, "shop").unwrap().rules[0].filters.is_empty(), "{filters}");
    }
}

#[test]
fn a_refused_value_is_named_with_what_is_wrong_with_it() {
    let set = |value: &str| json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x", "value": value}]}});
    let replace = |path: &str| json!({"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": path}}});
    for (filter, expected) in [
        (set("ö ü"), "value \"ö ü\" of header x has a character other than visible ASCII"),
        (replace("/f?x=1"), "path \"/f?x=1\" contains ? or #"),
        (replace("/a b"), "path \"/a b\" has a character outside of visible ASCII"),
    ] {
        let route = with_rules(RouteKind::Http, json!([{"filters": [filter]}]));
        let mut model = world();
        model.apply_route(route.clone());
        let message = &status(&model, &route)[0].accepted.message;
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn hostnames_are_said_to_have_no_effect_on_requests() {
    let of = |kind: RouteKind, hostnames: Value| {
        let spec = json!({"parentRefs": [web(json!({}))], "hostnames": hostnames, "rules": [{}]});
        let route = route_of(kind, "shop/r", spec);
        let mut model = world();
        model.apply_route(route.clone());
        let accepted = status(&model, &route)[0].accepted.clone();
        assert!(accepted.status, "{accepted:?}");
        accepted.message.contains("hostnames have no effect")
    };
    assert!(of(RouteKind::Http, json!(["a.example"])));
    assert!(of(RouteKind::Grpc, json!(["a.example"])));
    assert!(!of(RouteKind::Http, json!([])));
    assert!(!of(RouteKind::Tls, json!(["a.example"])));
}

#[test]
fn replacing_a_prefix_needs_a_prefix_and_a_redirect_excludes_a_rewrite() {
    let replace = json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": "/b"});
    let rewrite = json!({"type": "URLRewrite", "urlRewrite": {"path": replace}});
    let redirect = json!({"type": "RequestRedirect", "requestRedirect": {"path": replace}});
    for filter in [&rewrite, &redirect] {
        let of =
            |matches: Value| with_rules(RouteKind::Http, json!([{"matches": matches, "filters": [filter]}]));
        for (matches, expected) in [
            (json!([{"path": {"value": "/a"}}]), GOOD),
            (json!([]), GOOD),
            (
                json!([{"path": {"type": "Exact", "value": "/a"}}]),
                (false, "UnsupportedValue", "ResolvedRefs"),
            ),
            (
                json!([{"path": {"value": "/a"}}, {"path": {"type": "RegularExpression", "value": "/c.*"}}]),
                (false, "UnsupportedValue", "ResolvedRefs"),
            ),
        ] {
            let mut model = world();
            model.apply_route(of(matches.clone()));
            assert_eq!(verdict(&model, &of(matches.clone())), expected, "{matches}");
        }
    }
    let incompatible = (false, "IncompatibleFilters", "ResolvedRefs");
    for filters in [json!([rewrite, redirect]), json!([rewrite, rewrite])] {
        let route = with_rules(RouteKind::Http, json!([{"filters": filters}]));
        let mut model = world();
        model.apply_route(route.clone());
        assert_eq!(verdict(&model, &route), incompatible, "{filters}");
    }
}

#[test]
fn every_filter_is_sent() {
    let edits = json!({"set": [{"name": "a", "value": "1"}, {"name": "A", "value": "2"}], "add": [{"name": "b", "value": "x, y"}], "remove": ["c"]});
    let expected =
        HeaderEdits { set: vec![header("a", "1")], add: vec![header("b", "x, y")], remove: vec!["c".into()] };
    let mirror = |more: Value| {
        let mut mirror = json!({"backendRef": {"name": "api", "port": 80}});
        mirror.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"type": "RequestMirror", "requestMirror": mirror})
    };
    let mirrored = |numerator, denominator| {
        let backend = Some(backend(json!({"name": "api", "port": 80})).0);
        Kind::Mirror(Mirror { backend, numerator, denominator })
    };
    let cors = json!({"allowOrigins": ["https://*.example"], "allowCredentials": true, "allowMethods": ["PUT"],
        "allowHeaders": ["x-a"], "exposeHeaders": ["x-b"]});
    let made = filters(json!([
        {"type": "RequestHeaderModifier", "requestHeaderModifier": edits},
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": edits},
        {"type": "URLRewrite", "urlRewrite": {"hostname": "other.example", "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": ""}}},
        mirror(json!({})), mirror(json!({"percent": 10})), mirror(json!({"fraction": {"numerator": 1, "denominator": 1000}})),
        {"type": "CORS", "cors": cors},
    ]));
    let cors = Cors {
        allow_origins: vec!["https://*.example".into()],
        allow_credentials: true,
        allow_methods: vec!["PUT".into()],
        allow_headers: vec!["x-a".into()],
        expose_headers: vec!["x-b".into()],
        max_age_seconds: 5,
    };
    let rewrite =
        Rewrite { hostname: "other.example".into(), path: path(path_modifier::Kind::Prefix(String::new())) };
    let all = [
        Kind::RequestHeaders(expected.clone()),
        Kind::ResponseHeaders(expected),
        Kind::Rewrite(rewrite),
        mirrored(100, 100),
        mirrored(10, 100),
        mirrored(1, 1000),
        Kind::Cors(cors),
    ];
    assert_eq!(made, all);
    let redirect = json!({"scheme": "https", "hostname": "a.example", "port": 8443, "statusCode": 308, "path": {"type": "ReplaceFullPath", "replaceFullPath": "/x"}});
    let redirects = [
        (
            redirect,
            Redirect {
                scheme: "https".into(),
                hostname: "a.example".into(),
                port: 8443,
                status: 308,
                path: path(path_modifier::Kind::Full("/x".into())),
            },
        ),
        (json!({}), Redirect { status: 302, ..Redirect::default() }),
    ];
    for (spec, expected) in redirects {
        let made = filters(json!([{"type": "RequestRedirect", "requestRedirect": spec}]));
        assert_eq!(made, [Kind::Redirect(expected)]);
    }
}

#[test]
fn a_mirror_that_leads_nowhere_is_left_out_and_reported() {
    let mirror =
        json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "nobody", "port": 80}}});
    let route = with_rules(
        RouteKind::Http,
        json!([{"filters": [mirror], "backendRefs": [{"name": "api", "port": 80}]}]),
    );
    let mut model = world();
    model.apply_route(route.clone());
    assert_eq!(verdict(&model, &route), (true, "Accepted", "BackendNotFound"));
    let made = rules_at(&model, VIP, "shop").unwrap().rules.remove(0);
    assert_eq!((made.filters.len(), made.backends.len()), (0, 1));
}

#[test]
fn times_retries_and_sessions_are_sent() {
    let made = rule(json!({
        "timeouts": {"request": "1m30s", "backendRequest": "0s"},
        "retry": {"codes": [500, 503], "attempts": 0, "backoff": "100ms"},
        "sessionPersistence": {"sessionName": "user", "absoluteTimeout": "1h", "idleTimeout": "1500ms",
            "cookieConfig": {"lifetimeType": "Permanent"}},
    }));
    assert_eq!((made.request_timeout_ms, made.attempt_timeout_ms), (Some(90_000), Some(0)));
    let retry = made.retry.unwrap();
    assert_eq!((retry.codes.as_slice(), retry.attempts, retry.backoff_ms), ([500, 503].as_slice(), 0, 100));
    let session = made.session.unwrap();
    assert_eq!((session.r#type(), session.name.as_str()), (session_persistence::Type::Cookie, "user"));
    assert_eq!((session.absolute_seconds, session.idle_seconds, session.permanent), (3600, 2, true));
    let made = rule(json!({"retry": {}, "sessionPersistence": {"type": "Header"}}));
    assert_eq!((made.request_timeout_ms, made.retry.unwrap().attempts), (None, 2));
    let session = made.session.unwrap();
    assert_eq!((session.r#type(), session.name.as_str()), (session_persistence::Type::Header, "tulle-r-0"));
    for bad in [
        json!({"timeouts": {"request": "1.5s"}}),
        json!({"retry": {"codes": [200]}}),
        json!({"sessionPersistence": {"type": "Telepathy"}}),
        json!({"sessionPersistence": {"sessionName": "a;b"}}),
        json!({"sessionPersistence": {"type": "Header", "sessionName": "Connection"}}),
    ] {
        let mut model = world();
        let route = with_rules(RouteKind::Http, json!([bad]));
        model.apply_route(route.clone());
        assert_eq!(verdict(&model, &route).1, "UnsupportedValue", "{bad}");
    }
}

#[test]
fn a_backend_that_exists_is_named_by_its_endpoints() {
    let (made, reason) = backend(json!({"name": "api", "port": 80}));
    assert_eq!(
        (made.endpoints.as_str(), made.weight, made.protocol(), reason),
        ("shop/api:80", 1, Protocol::Detect, "ResolvedRefs")
    );
    // No ReferenceGrant is needed in a mesh.
    let (made, reason) = backend(json!({"name": "far", "namespace": "team", "port": 80, "weight": 7}));
    assert_eq!(
        (made.endpoints.as_str(), made.weight, made.protocol(), reason),
        ("team/far:80", 7, Protocol::Http2, "ResolvedRefs")
    );
    assert_eq!(
        backend(json!({"group": "", "kind": "Service", "name": "headless", "port": 80})).1,
        "ResolvedRefs"
    );
}

#[test]
fn a_backend_that_cannot_be_used_keeps_its_weight_and_is_reported() {
    for (spec, expected) in [
        (json!({"name": "nobody", "port": 80, "weight": 3}), "BackendNotFound"),
        (json!({"name": "api", "port": 81, "weight": 3}), "BackendNotFound"),
        (json!({"name": "api", "weight": 3}), "BackendNotFound"),
        (json!({"name": "alias", "port": 80, "weight": 3}), "BackendNotFound"),
        (
            json!({"kind": "ServiceImport", "group": "multicluster.x-k8s.io", "name": "api", "port": 80, "weight": 3}),
            "InvalidKind",
        ),
        (json!({"name": "tls", "port": 443, "weight": 3}), "UnsupportedProtocol"),
    ] {
        let (made, reason) = backend(spec.clone());
        assert_eq!((made.endpoints.as_str(), made.weight, reason), ("", 3, expected), "{spec}");
    }
    let (made, reason) = backend(json!({"name": "nobody", "port": 80, "weight": 0}));
    assert_eq!((made.weight, reason), (0, "BackendNotFound"), "no request meets it");
}

#[test]
fn a_backend_that_appears_is_used() {
    let mut model = world();
    let route = with_rules(RouteKind::Http, json!([{"backendRefs": [{"name": "new", "port": 80}]}]));
    model.apply_route(route.clone());
    assert_eq!(verdict(&model, &route).2, "BackendNotFound");
    model.apply_service(key("shop", "new"), service("10.96.0.7", &[("http", 80, None)]));
    assert_eq!(verdict(&model, &route), GOOD);
    assert_eq!(rules_at(&model, VIP, "shop").unwrap().rules[0].backends[0].endpoints, "shop/new:80");
}

#[test]
fn grpc_needs_http_2_at_its_backends() {
    for (declared, expected) in [
        (None, (Protocol::Http2, "ResolvedRefs")),
        (Some("grpc"), (Protocol::Http2, "ResolvedRefs")),
        (Some("kubernetes.io/ws"), (Protocol::Detect, "UnsupportedProtocol")),
        (Some("redis"), (Protocol::Detect, "UnsupportedProtocol")),
    ] {
        let mut model = world();
        model.apply_service(key("shop", "api"), service("10.96.0.2", &[("grpc", 80, declared)]));
        let route = with_rules(RouteKind::Grpc, json!([{"backendRefs": [{"name": "api", "port": 80}]}]));
        model.apply_route(route.clone());
        let made = rules_at(&model, VIP, "shop").unwrap().rules.remove(0).backends.remove(0);
        assert_eq!((made.protocol(), verdict(&model, &route).2), expected, "{declared:?}");
    }
}

#[test]
fn a_client_is_led_to_the_family_that_it_dialled_where_the_backend_has_it() {
    let mut model = world();
    let both = |one: &str, other: &str, ports| {
        let made = service(one, ports);
        Service { cluster_ips: vec![one.parse().unwrap(), other.parse().unwrap()], ..made }
    };
    model.apply_service(key("shop", "web"), both("10.96.0.1", "fd00::1", &[("http", 80, None)]));
    model.apply_route(with_rules(RouteKind::Http, json!([{"backendRefs": [{"name": "api", "port": 80}]}])));
    let leads_to = |model: &Model| {
        rules_at(model, "[fd00::1]:80", "shop").unwrap().rules.remove(0).backends.remove(0).endpoints
    };
    assert_eq!(leads_to(&model), "shop/api:80", "it has the other one only");
    model.apply_service(key("shop", "api"), both("10.96.0.2", "fd00::2", &[("http", 80, None)]));
    assert_eq!(leads_to(&model), "shop/api:80/ipv6");
}

#[test]
fn a_rule_with_more_regular_expressions_than_a_route_may_have_is_dropped() {
    let header = |n: usize| json!({"type": "RegularExpression", "name": format!("x-{n}"), "value": "a+"});
    let rule = |name: &str, headers: usize| {
        let headers: Vec<Value> = (0..headers).map(header).collect();
        json!({"name": name, "matches": (0..8).map(|_| json!({"headers": headers})).collect::<Vec<_>>()})
    };
    let route = with_rules(RouteKind::Http, json!([rule("few", 8), rule("many", 9), rule("more", 8)]));
    let mut model = world();
    model.apply_route(route.clone());
    let names: Vec<String> =
        rules_at(&model, VIP, "shop").unwrap().rules.into_iter().map(|rule| rule.name).collect();
    assert_eq!(names, ["few", "more"]);
    let dropped = status(&model, &route)[0].partially_invalid.clone().unwrap();
    assert!(dropped.contains("rules[1]: more than 128 regular expressions"), "{dropped}");
}
