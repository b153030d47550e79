use serde_json::json;

use super::*;

fn request(path: &str, grpc: bool) -> Request {
    Request {
        namespace: "mesh".to_owned(),
        service: "echo".to_owned(),
        port: 80,
        grpc,
        method: "GET".to_owned(),
        path: path.to_owned(),
        headers: Vec::new(),
        times: 1,
    }
}

/// What is said of a request to `/p` that reaches `mesh/v1`, with this reason in stage `backend`.
fn reached(because: &str) -> Said {
    let explained = json!({"reaches": true, "outcome": "GET /p from mesh/c reaches mesh/v1:8080 at 1 of its pods, over mTLS.",
        "stages": [{"name": "route", "object": "HTTPRoute/mesh/r"}, {"name": "backend", "because": because}]});
    Said::read(&explained, &request("/p", false)).unwrap()
}

/// What is said of a request that ends with this answer.
fn refused(answer: &str) -> Said {
    let outcome = format!("GET /p from mesh/c does not reach mesh/echo:80: {answer}.");
    let explained = json!({"reaches": false, "outcome": outcome, "stages": []});
    Said::read(&explained, &request("/p", false)).unwrap()
}

fn pods() -> Pods {
    let one = |name: &str| BTreeSet::from([name.to_owned()]);
    Pods::from([("mesh/v1".to_owned(), one("v1-a")), ("mesh/v2".to_owned(), one("v2-a"))])
}

/// The application's answer to `/p`.
fn from(pod: &str) -> Seen {
    Seen { status: "200".to_owned(), pod: pod.to_owned(), path: "/p".to_owned(), ..Seen::default() }
}

fn answered(status: &str, reason: &str, location: &str) -> Seen {
    Seen {
        status: status.to_owned(),
        reason: reason.to_owned(),
        location: location.to_owned(),
        ..Seen::default()
    }
}

fn agree(said: &Said, seen: Seen) -> bool {
    difference(&request("/p", false), said, &[seen], &pods()).is_none()
}

#[test]
fn the_pod_that_answers_belongs_to_the_backend_that_is_named() {
    for because in [
        "to mesh/v1:8080; no section about calls holds",
        "to Service mesh/v1:8080 itself, without timeouts, retries or a breaker",
        "to Service mesh/v1:8080 itself; no section about calls holds",
    ] {
        let said = reached(because);
        assert!(agree(&said, from("v1-a")), "{said:?}");
        assert!(!agree(&said, from("v2-a")), "{said:?}");
        assert!(!agree(&said, answered("404", "RouteNone", "")), "{said:?}");
        assert!(!agree(&said, Seen { error: "timed out".to_owned(), ..from("") }), "{said:?}");
    }
}

#[test]
fn the_application_sees_the_path_that_is_named() {
    let said = reached("to mesh/v1:8080, with the path /q; no section about calls holds");
    assert!(agree(&said, Seen { path: "/q".to_owned(), ..from("v1-a") }));
    assert!(!agree(&said, from("v1-a")));
}

#[test]
fn shares_name_all_backends_that_may_answer_and_those_that_must() {
    let said = reached(
        "66.67 % to mesh/v1:8080, 33.33 % to mesh/v2:8080; what follows is about mesh/v1:8080; no section about calls holds",
    );
    assert_eq!((said.chosen.as_str(), said.backends[1].share), ("mesh/v1", 3_333));
    assert!(agree(&said, from("v1-a")) && agree(&said, from("v2-a")));
    assert!(!agree(&said, from("v3-a")));
    let many = Request { times: SAMPLE, ..request("/p", false) };
    let mut seen = vec![from("v1-a"); usize::try_from(SAMPLE).unwrap()];
    let found = difference(&many, &said, &seen, &pods()).unwrap();
    assert!(found.contains("mesh/v2"), "{found}");
    seen[7] = from("v2-a");
    assert_eq!(difference(&many, &said, &seen, &pods()), None);
    seen.pop();
    assert!(difference(&many, &said, &seen, &pods()).is_some(), "an answer is missing");
}

#[test]
fn an_invalid_share_may_be_answered_500() {
    let because = "90 % to mesh/v1:8080, 10 % to mesh/no:80, which is answered 500 (RouteNoBackend); what follows is about mesh/v1:8080; no section about calls holds";
    let said = reached(because);
    assert!(said.backends[1].invalid && !said.backends[0].invalid);
    assert!(agree(&said, from("v1-a")) && agree(&said, answered("500", "RouteNoBackend", "")));
    assert!(!agree(&reached("to mesh/v1:8080; none"), answered("500", "RouteNoBackend", "")));
}

#[test]
fn an_answer_of_a_sidecar_agrees_in_status_reason_and_location() {
    let said = refused("its sidecar answers 404 (RouteNone)");
    assert!(agree(&said, answered("404", "RouteNone", "")));
    assert!(!agree(&said, answered("503", "UpstreamNone", "")));
    assert!(!agree(&said, from("v1-a")));
    let said = refused("its sidecar answers 302 with Location http://example.org:8083/p");
    assert!(agree(&said, answered("302", "", "http://example.org:8083/p")));
    assert!(!agree(&said, answered("301", "", "http://example.org:8083/p")));
    assert!(!agree(&said, answered("302", "", "http://example.org/p")));
    let said = refused("no pod takes the connection");
    assert!(agree(&said, answered("000", "", "")));
    assert!(!agree(&said, from("v1-a")));
}

#[test]
fn a_call_is_compared_by_its_code_or_by_the_reason_of_a_sidecar() {
    let said = reached("to mesh/v1:7070; no section about calls holds");
    let (echo, other) = (request(ECHO, true), request("/nobody.Nothing/Nothing", true));
    let ok = Seen { status: "OK".to_owned(), pod: "v1-a".to_owned(), ..Seen::default() };
    let none = |request: &Request, said: &Said, seen: &Seen| {
        difference(request, said, std::slice::from_ref(seen), &pods()).is_none()
    };
    assert!(none(&echo, &said, &ok));
    assert!(!none(&echo, &said, &Seen { pod: "v2-a".to_owned(), ..ok.clone() }));
    assert!(!none(&echo, &said, &answered("UNIMPLEMENTED", "", "")));
    assert!(none(&other, &said, &answered("UNIMPLEMENTED", "", "")));
    assert!(!none(&other, &said, &answered("UNIMPLEMENTED", "RouteNone", "")));
    let said = refused("its sidecar answers 404 (RouteNone)");
    assert!(none(&other, &said, &answered("UNIMPLEMENTED", "RouteNone", "")));
    assert!(!none(&other, &said, &answered("UNIMPLEMENTED", "", "")));
}

#[test]
fn words_that_are_not_known_are_an_error() {
    let stages = json!([{"name": "backend", "because": "somewhere"}]);
    for (reaches, outcome) in [(true, "GET /p from mesh/c reaches mesh/v1:80."), (false, "It does not.")] {
        let explained = json!({"reaches": reaches, "outcome": outcome, "stages": stages});
        assert!(Said::read(&explained, &request("/p", false)).is_err(), "{explained}");
    }
    assert!(Said::read(&json!({}), &request("/p", false)).is_err());
}
