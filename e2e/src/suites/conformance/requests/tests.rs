use super::*;

fn services() -> Vec<Value> {
    vec![json!({"metadata": {"namespace": "mesh", "name": "echo"}, "spec": {"ports": [
        {"name": "http", "port": 80, "appProtocol": "http"},
        {"name": "http-alt", "port": 8080, "appProtocol": "http"},
        {"name": "https", "port": 443},
        {"name": "grpc", "port": 7070, "appProtocol": "kubernetes.io/h2c"},
    ]}})]
}

fn route(kind: &str, parent: Value, rules: Value) -> Value {
    json!({"kind": kind, "metadata": {"namespace": "mesh", "name": "r"},
        "spec": {"parentRefs": [parent], "rules": rules}})
}

fn parent() -> Value {
    json!({"group": "", "kind": "Service", "name": "echo", "port": 80})
}

/// Methods, paths and, but for the host, headers of what is derived from one match of an HTTPRoute.
fn of_match(wanted: Value) -> Vec<String> {
    let found = requests(&route("HTTPRoute", parent(), json!([{"matches": [wanted]}])), &services()).unwrap();
    let line = |request: &Request| {
        let headers = request.headers.iter().filter(|(name, _)| name != "host");
        let headers: String = headers.map(|(name, value)| format!(" {name}:{value}")).collect();
        format!("{} {}{headers}", request.method, request.path)
    };
    found.iter().filter(|request| request.port == 80).map(line).collect()
}

#[test]
fn a_path_is_hit_and_missed_by_a_suffix() {
    let found = of_match(json!({"path": {"type": "Exact", "value": "/v1"}}));
    let expected = ["GET /v1", "GET /v1-more", "GET /v1/more", "GET /nowhere-at-all", "GET /v1", "POST /v1"];
    assert_eq!(found, expected);
}

#[test]
fn a_regular_expression_is_hit_by_a_string_that_it_matches() {
    let found = of_match(json!({"path": {"type": "RegularExpression", "value": "^/v[0-9]+/\\d\\.x$"}}));
    assert_eq!(found[0], "GET /v0/1.x");
    for unknown in ["/(a|b)", "/a{2}", "/[^a]", "/\\pL", "/[a"] {
        assert!(example(unknown).is_err(), "{unknown}");
    }
}

#[test]
fn each_condition_is_left_out_and_changed() {
    let found = of_match(json!({
        "path": {"type": "PathPrefix", "value": "/p"}, "method": "PUT",
        "headers": [{"name": "Version", "value": "one"}],
        "queryParams": [{"name": "animal", "value": "blue whale"}],
    }));
    let query = "?animal=blue%20whale";
    for expected in [
        format!("PUT /p{query} Version:one"),
        format!("PUT /p-more{query} Version:one"),
        format!("PUT /p/more{query} Version:one"),
        format!("POST /p{query} Version:one"),
        format!("PUT /p{query} VERSION:one"),
        format!("PUT /p{query}"),
        format!("PUT /p{query} Version:one-other"),
        "PUT /p Version:one".to_owned(),
        format!("PUT /p{query}-other Version:one"),
        "GET /nowhere-at-all".to_owned(),
    ] {
        assert!(found.contains(&expected), "{expected} is not among {found:#?}");
    }
    assert_eq!(found[0], format!("PUT /p{query} Version:one"));
}

#[test]
fn a_rule_without_matches_is_hit_at_every_port_for_http() {
    for (parent, first) in [
        (parent(), 80),
        (json!({"kind": "Service", "name": "echo", "sectionName": "http-alt"}), 8080),
        (json!({"kind": "Service", "name": "echo"}), 80),
    ] {
        let found = requests(&route("HTTPRoute", parent, json!([{}])), &services()).unwrap();
        assert_eq!((found[0].path.as_str(), found[0].port), ("/", first));
        assert_eq!(found[0].headers, [pair("host", "echo.mesh")]);
        let elsewhere = found.iter().filter(|request| request.port != first);
        assert_eq!(elsewhere.count(), 1);
        assert!(found.iter().any(|request| request.headers == [pair("host", "elsewhere.example")]));
    }
}

#[test]
fn only_a_request_that_is_divided_is_sent_often() {
    let rules = |weight: u32| {
        json!([{"backendRefs": [{"name": "a", "weight": 9}, {"name": "b", "weight": weight}]},
            {"matches": [{"path": {"type": "Exact", "value": "/"}}], "backendRefs": [{"name": "a"}]}])
    };
    let often = |weight| {
        let found = requests(&route("HTTPRoute", parent(), rules(weight)), &services()).unwrap();
        let often = found.iter().filter(|request| request.times > 1);
        often.map(|request| (request.path.clone(), request.port, request.times)).collect::<Vec<_>>()
    };
    // The second rule's request is the same, and is not sent twice.
    assert_eq!(often(1), [("/".to_owned(), 80, SAMPLE)]);
    assert!(often(0).is_empty());
}

#[test]
fn calls_name_service_and_method() {
    let parent = json!({"kind": "Service", "name": "echo", "port": 7070});
    let all = route("GRPCRoute", parent.clone(), json!([{}]));
    let found = requests(&all, &services()).unwrap();
    assert!(found.iter().all(|request| request.grpc && request.port == 7070 && request.method == "POST"));
    let paths: Vec<&str> = found.iter().map(|request| request.path.as_str()).collect();
    let expected =
        [ECHO, "/proto.EchoTestService/EchoMore", "/another.Service/Echo", "/nobody.Nothing/Nothing"];
    assert_eq!(paths, expected);
    let wanted =
        json!({"method": {"service": "a.B", "method": "C"}, "headers": [{"name": "X-A", "value": "b"}]});
    let found = requests(&route("GRPCRoute", parent, json!([{"matches": [wanted]}])), &services()).unwrap();
    assert_eq!(found[0].path, "/a.B/C");
    assert!(found[0].headers.contains(&pair("x-a", "b")), "{:?}", found[0].headers);
    assert!(found[0].headers.contains(&pair("content-type", "application/grpc")));
}

#[test]
fn what_cannot_be_derived_is_an_error() {
    let error = |route: Value| format!("{:#}", requests(&route, &services()).unwrap_err());
    assert!(error(route("TLSRoute", parent(), json!([{}]))).contains("TLSRoute"));
    assert!(error(route("HTTPRoute", parent(), json!([]))).contains("no rules"));
    let stranger = json!({"kind": "Service", "name": "nobody"});
    assert!(error(route("HTTPRoute", stranger, json!([{}]))).contains("mesh/nobody"));
    let unknown = json!([{"matches": [{"path": {"type": "Glob", "value": "/*"}}]}]);
    assert!(error(route("HTTPRoute", parent(), unknown)).contains("Glob"));
}
