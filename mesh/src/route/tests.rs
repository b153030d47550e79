use proptest::prelude::*;

use super::*;
use crate::proto::value_match::Type;

/// A request with one line per header.
struct Request<'a> {
    method: &'a str,
    target: &'a str,
    headers: &'a [(&'a str, &'a str)],
}

impl Subject for Request<'_> {
    fn method(&self) -> &str {
        self.method
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or("/")
    }

    fn query(&self) -> Option<&str> {
        Some(self.target.split_once('?')?.1)
    }

    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let lines = self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
        let lines: Vec<_> = lines.map(|(_, value)| *value).collect();
        match lines.as_slice() {
            [] => None,
            [one] => Some(Cow::Borrowed(one.as_bytes())),
            several => Some(Cow::Owned(several.join(",").into_bytes())),
        }
    }
}

fn get(target: &str) -> Request<'_> {
    Request { method: "GET", target, headers: &[] }
}

fn value(type_: Type, name: &str, value: &str) -> proto::ValueMatch {
    proto::ValueMatch { r#type: type_ as i32, name: name.to_owned(), value: value.to_owned() }
}

fn path(type_: Type, path: &str) -> proto::Match {
    proto::Match { path: Some(value(type_, "", path)), ..Default::default() }
}

fn header(type_: Type, name: &str, wanted: &str) -> proto::Match {
    proto::Match { headers: vec![value(type_, name, wanted)], ..Default::default() }
}

fn query(type_: Type, name: &str, wanted: &str) -> proto::Match {
    proto::Match { query: vec![value(type_, name, wanted)], ..Default::default() }
}

fn names(names: &[&str]) -> proto::Match {
    proto::Match { server_names: names.iter().map(|name| (*name).to_owned()).collect(), ..Default::default() }
}

/// One rule per match, in this order.
fn rules(kind: RouteKind, matches: Vec<proto::Match>) -> proto::Rules {
    let rules = vec![proto::RouteRule::default(); matches.len()];
    let numbered = (0..).zip(matches).map(|(rule, m)| proto::Match { rule, ..m });
    proto::Rules { kind: kind as i32, rules, matches: numbered.collect(), ..Default::default() }
}

fn http(matches: Vec<proto::Match>) -> Matcher {
    Matcher::compile(&rules(RouteKind::Http, matches)).unwrap()
}

fn refused(m: proto::Match) -> RouteError {
    Matcher::compile(&rules(RouteKind::Http, vec![m])).unwrap_err()
}

#[track_caller]
fn assert_matches(m: proto::Match, request: &Request<'_>, expected: bool) {
    assert_eq!(http(vec![m]).find(request).is_some(), expected, "{} {}", request.method, request.target);
}

#[test]
fn a_prefix_matches_whole_segments_and_its_last_slash_makes_no_difference() {
    for prefix in ["/v2", "/v2/"] {
        let matcher = http(vec![path(Type::Prefix, prefix)]);
        for (target, expected) in [
            ("/v2", true),
            ("/v2/", true),
            ("/v2/example", true),
            ("/v2?x=1", true),
            ("/v2//", true),
            ("/v2example", false),
            ("/foo/v2/example", false),
            ("/V2", false),
            ("/", false),
            ("/v", false),
            ("/%762", false),
        ] {
            let found = matcher.find(&get(target));
            assert_eq!(
                found,
                expected.then_some(Found { rule: 0, prefix: Some(prefix) }),
                "{prefix} {target}"
            );
        }
    }
}

#[test]
fn the_root_as_prefix_matches_every_path() {
    let matcher = http(vec![path(Type::Prefix, "/")]);
    for target in ["/", "/a", "//", "*", "/a/b?c"] {
        assert_eq!(matcher.find(&get(target)), Some(Found { rule: 0, prefix: Some("/") }), "{target}");
    }
}

#[test]
fn an_exact_path_matches_only_itself() {
    let matcher = http(vec![path(Type::Exact, "/v2/")]);
    for (target, expected) in [("/v2/", true), ("/v2/?x", true), ("/v2", false), ("/v2/a", false)] {
        assert_eq!(
            matcher.find(&get(target)),
            expected.then_some(Found { rule: 0, prefix: None }),
            "{target}"
        );
    }
}

#[test]
fn a_regular_expression_matches_the_whole_path_without_the_query() {
    let matcher = http(vec![path(Type::Regex, "/users/[0-9]+")]);
    for (target, expected) in
        [("/users/12", true), ("/users/12?x=1", true), ("/users/12/orders", false), ("/v1/users/12", false)]
    {
        assert_eq!(
            matcher.find(&get(target)),
            expected.then_some(Found { rule: 0, prefix: None }),
            "{target}"
        );
    }
}

#[test]
fn a_header_is_matched_by_its_name_without_case_and_its_value_with_it() {
    let request = Request { headers: &[("X-Version", "One"), ("x-many", "a"), ("X-Many", "b")], ..get("/") };
    for (type_, name, wanted, expected) in [
        (Type::Exact, "x-version", "One", true),
        (Type::Exact, "X-VERSION", "One", true),
        (Type::Exact, "x-version", "one", false),
        (Type::Exact, "x-version", "On", false),
        (Type::Exact, "x-other", "One", false),
        (Type::Exact, "x-other", "", false),
        (Type::Exact, "x-many", "a,b", true),
        (Type::Exact, "x-many", "a", false),
        (Type::Regex, "x-version", "O.e", true),
        (Type::Regex, "x-version", "O", false),
        (Type::Regex, "x-many", "(.*,)?b", true),
    ] {
        assert_matches(header(type_, name, wanted), &request, expected);
    }
}

#[test]
fn every_header_of_a_match_must_match_and_of_equal_names_the_first_counts() {
    let both = |second: (&str, &str)| proto::Match {
        headers: vec![value(Type::Exact, "x-a", "1"), value(Type::Exact, second.0, second.1)],
        ..Default::default()
    };
    let request = Request { headers: &[("x-a", "1"), ("x-b", "2")], ..get("/") };
    assert_matches(both(("x-b", "2")), &request, true);
    assert_matches(both(("x-b", "3")), &request, false);
    assert_matches(both(("X-A", "3")), &request, true);
    assert_matches(both(("x-a", "1")), &Request { headers: &[("x-a", "3")], ..get("/") }, false);
}

#[test]
fn a_query_parameter_is_matched_decoded_and_of_several_the_first_counts() {
    for (type_, name, wanted, target, expected) in [
        (Type::Exact, "animal", "whale", "/?animal=whale", true),
        (Type::Exact, "animal", "whale", "/?color=blue&animal=whale", true),
        (Type::Exact, "animal", "whale", "/?animal=dolphin&animal=whale", false),
        (Type::Exact, "animal", "blue whale", "/?animal=blue%20whale", true),
        (Type::Exact, "animal", "blue whale", "/?anim%61l=blue+whale", true),
        (Type::Exact, "animal", "whale", "/?ANIMAL=whale", false),
        (Type::Exact, "animal", "whale", "/?animal=Whale", false),
        (Type::Exact, "animal", "", "/?animal", true),
        (Type::Exact, "animal", "", "/", false),
        (Type::Exact, "animal", "whale", "/", false),
        (Type::Regex, "animal", "whale|dolphin", "/?animal=dolphin", true),
        (Type::Regex, "animal", "wh.*e", "/?animal=wh%61le", true),
        (Type::Regex, "animal", "whale", "/?animal=whales", false),
        (Type::Regex, "animal", ".*", "/?animal=%ff", false),
    ] {
        assert_matches(query(type_, name, wanted), &get(target), expected);
    }
    let repeated = proto::Match {
        query: vec![value(Type::Exact, "a", "1"), value(Type::Exact, "a", "2"), value(Type::Exact, "A", "3")],
        ..Default::default()
    };
    assert_matches(repeated.clone(), &get("/?a=1&A=3"), true);
    assert_matches(repeated, &get("/?a=1"), false);
}

#[test]
fn a_method_is_matched_with_case() {
    let post = || proto::Match { method: "POST".to_owned(), ..Default::default() };
    assert_matches(post(), &Request { method: "POST", ..get("/") }, true);
    assert_matches(post(), &Request { method: "post", ..get("/") }, false);
    assert_matches(post(), &get("/"), false);
    assert_matches(proto::Match::default(), &get("/"), true);
}

#[test]
fn the_service_and_method_of_a_grpc_call_are_read_from_its_path() {
    let call = |service: Option<(Type, &str)>, method: Option<(Type, &str)>| {
        let of = |part: Option<(Type, &str)>| part.map(|(type_, text)| value(type_, "", text));
        let m = proto::Match { grpc_service: of(service), grpc_method: of(method), ..Default::default() };
        Matcher::compile(&rules(RouteKind::Grpc, vec![m])).unwrap()
    };
    let exact = |text| Some((Type::Exact, text));
    let regex = |text| Some((Type::Regex, text));
    for (service, method, target, expected) in [
        (exact("shop.Orders"), exact("Create"), "/shop.Orders/Create", true),
        (exact("shop.Orders"), exact("Create"), "/shop.Orders/create", false),
        (exact("shop.Orders"), None, "/shop.Orders/Delete", true),
        (exact("shop.Orders"), exact(""), "/shop.Orders/Delete", true),
        (exact("Orders"), None, "/shop.Orders/Create", false),
        (None, exact("Create"), "/shop.Orders/Create", true),
        (regex("shop\\..*"), regex("Get.+"), "/shop.Orders/GetOne", true),
        (regex("shop\\..*"), regex("Get.+"), "/shop.Orders/Get", false),
        (regex(".*"), None, "/shop.Orders", false),
        (regex(".*"), None, "/shop/Orders/Create", false),
        (None, regex(".*"), "/shop.Orders/", false),
        (None, None, "/anything", true),
    ] {
        let request = Request { method: "POST", ..get(target) };
        assert_eq!(
            call(service, method).find(&request).is_some(),
            expected,
            "{service:?} {method:?} {target}"
        );
    }
}

#[test]
fn the_first_match_decides_and_says_which_rule_it_is_of() {
    let mut of_rules = rules(RouteKind::Http, vec![path(Type::Prefix, "/a/b"), path(Type::Prefix, "/a")]);
    let specific = proto::Match { rule: 1, ..header(Type::Exact, "version", "two") };
    of_rules.matches.insert(0, specific);
    let matcher = Matcher::compile(&of_rules).unwrap();
    let version_two = Request { headers: &[("version", "two")], ..get("/a/b") };
    assert_eq!(matcher.find(&version_two), Some(Found { rule: 1, prefix: None }));
    assert_eq!(matcher.find(&get("/a/b/c")), Some(Found { rule: 0, prefix: Some("/a/b") }));
    assert_eq!(matcher.find(&get("/a/bc")), Some(Found { rule: 1, prefix: Some("/a") }));
    assert_eq!(matcher.find(&get("/b")), None);
}

#[test]
fn the_most_specific_server_name_wins_wherever_it_stands() {
    let matcher = Matcher::compile(&rules(
        RouteKind::Tls,
        vec![
            names(&[]),
            names(&["*.example.com"]),
            names(&["*.shop.example.com", "other.org"]),
            names(&["web.shop.example.com"]),
            names(&["web.shop.example.com"]),
        ],
    ))
    .unwrap();
    for (name, expected) in [
        (Some("web.shop.example.com"), 3),
        (Some("WEB.shop.Example.com"), 3),
        (Some("api.shop.example.com"), 2),
        (Some("a.b.shop.example.com"), 2),
        (Some("shop.example.com"), 1),
        (Some("example.com"), 0),
        (Some(".example.com"), 0),
        (Some("badexample.com"), 0),
        (Some("OTHER.org"), 2),
        (None, 0),
    ] {
        assert_eq!(matcher.find_server_name(name), Some(expected), "{name:?}");
    }
    assert_eq!(matcher.find(&get("/")), None);
}

#[test]
fn a_connection_without_a_server_name_matches_only_a_rule_without_names() {
    let matcher = Matcher::compile(&rules(RouteKind::Tls, vec![names(&["*.example.com"])])).unwrap();
    assert_eq!(matcher.find_server_name(None), None);
    assert_eq!(matcher.find_server_name(Some("example.org")), None);
}

#[test]
fn every_tcp_connection_takes_the_first_rule() {
    let compile = |rules: &proto::Rules| Matcher::compile(rules).unwrap();
    let without_matches =
        proto::Rules { matches: vec![], ..rules(RouteKind::Tcp, vec![proto::Match::default()]) };
    assert_eq!(compile(&without_matches).find_server_name(None), Some(0));
    let mut two = rules(RouteKind::Tcp, vec![proto::Match::default(), proto::Match::default()]);
    two.matches.reverse();
    assert_eq!(compile(&two).find_server_name(Some("example.com")), Some(1));
    assert_eq!(compile(&rules(RouteKind::Tcp, vec![])).find_server_name(None), None);
    assert_eq!(http(vec![proto::Match::default()]).find_server_name(None), None);
}

#[test]
fn values_that_cannot_be_matched_are_refused_by_name() {
    assert_eq!(refused(path(Type::Exact, "v1")), RouteError::Path("v1".to_owned()));
    assert_eq!(refused(path(Type::Prefix, "")), RouteError::Path(String::new()));
    assert_eq!(refused(header(Type::Exact, "x y", "")), RouteError::HeaderName("x y".to_owned()));
    assert_eq!(refused(header(Type::Exact, "", "")), RouteError::HeaderName(String::new()));
    assert_eq!(refused(query(Type::Exact, "", "")), RouteError::QueryName);
    for name in ["*", "*.", "", "a..b", "a.*.b", "**.a", "a b"] {
        assert_eq!(refused(names(&[name])), RouteError::ServerName(name.to_owned()));
    }
    let regex = refused(header(Type::Regex, "x", "("));
    assert!(regex.to_string().starts_with("invalid regular expression \"(\": "), "{regex}");
}

#[test]
fn a_way_to_compare_that_this_build_does_not_know_is_refused_and_not_taken_for_another() {
    let way = |m| match refused(m) {
        RouteError::Comparison { part, way } => (part, way),
        other => panic!("{other}"),
    };
    assert_eq!(way(path(Type::Unspecified, "/")), ("path", 0));
    assert_eq!(way(path(Type::Cookie, "/")), ("path", 4));
    assert_eq!(way(header(Type::Prefix, "x", "")), ("headers", 2));
    assert_eq!(way(query(Type::Prefix, "x", "")), ("query parameters", 2));
    let mut newer = header(Type::Exact, "x", "");
    newer.headers[0].r#type = 9;
    assert_eq!(way(newer), ("headers", 9));
    let mut grpc = proto::Match { grpc_service: Some(value(Type::Prefix, "", "a")), ..Default::default() };
    assert_eq!(way(grpc.clone()), ("gRPC service", 2));
    grpc.grpc_method = grpc.grpc_service.take();
    assert_eq!(way(grpc), ("gRPC method", 2));
}

#[test]
fn a_match_of_a_missing_rule_and_an_unknown_kind_are_refused() {
    let mut missing = rules(RouteKind::Http, vec![proto::Match::default()]);
    missing.matches[0].rule = 1;
    assert_eq!(Matcher::compile(&missing), Err(RouteError::Rule { rule: 1, rules: 1 }));
    for kind in [0, 5] {
        let unknown = proto::Rules { kind, ..Default::default() };
        assert_eq!(Matcher::compile(&unknown), Err(RouteError::Kind(kind)));
    }
}

proptest! {
    #[test]
    fn a_prefix_matches_exactly_the_paths_that_start_with_its_segments(
        prefix in "(/[ab]{1,2}){0,3}/?", target in "(/[ab]{0,2}){1,4}"
    ) {
        prop_assume!(prefix.starts_with('/'));
        let wanted: Vec<_> = prefix.trim_end_matches('/').split('/').collect();
        let expected = target.split('/').take(wanted.len()).eq(wanted);
        let matcher = http(vec![path(Type::Prefix, &prefix)]);
        prop_assert_eq!(matcher.find(&get(&target)).is_some(), expected, "{} {}", prefix, target);
    }
}
