use std::cell::Cell;

use super::*;
use crate::canonical::readings;

fn peer(account: &str, namespace: &str) -> proto::Peer {
    proto::Peer {
        service_account: account.into(),
        namespaces: vec![namespace.into()],
        any_namespace: namespace.is_empty(),
        cidr: String::new(),
    }
}

fn subject(identity: Option<&WorkloadId>) -> Subject<'_> {
    Subject { identity, address: "10.1.2.3".parse().unwrap(), port: 8080, http: None }
}

fn request(access: &Access, method: &str, target: &str) -> Decision {
    let found = readings(target);
    let readings = || &found;
    access.decide(&Subject { http: Some(Http { method, readings: &readings }), ..subject(None) })
}

fn to(operation: proto::Operation) -> Vec<proto::Rule> {
    vec![proto::Rule { from: vec![], to: vec![operation] }]
}

fn path(pattern: &str) -> Vec<proto::Rule> {
    to(proto::Operation { paths: vec![pattern.into()], ..Default::default() })
}

fn access(allow: Option<Vec<proto::Rule>>, deny: Vec<proto::Rule>) -> Access {
    let has_allow = allow.is_some();
    let allow = allow.unwrap_or_default();
    Access::compile(&proto::Access { has_allow, allow, deny, ..Default::default() }).unwrap()
}

#[test]
fn deny_wins_over_allow() {
    let rule = proto::Rule { from: vec![peer("web", "shop")], to: vec![] };
    let both = access(Some(vec![rule.clone()]), vec![rule]);
    let web = WorkloadId::new("cluster.local", "shop", "web");
    assert_eq!(both.decide(&subject(Some(&web))).reason, Reason::DenyRule(0));
}

#[test]
fn an_empty_allow_list_denies_all_and_an_absent_one_allows_all() {
    assert!(!access(Some(vec![]), vec![]).decide(&subject(None)).allowed);
    assert!(access(None, vec![]).decide(&subject(None)).allowed);
}

#[test]
fn a_service_account_matches_only_in_its_namespace_and_never_a_plain_client() {
    let rule = proto::Rule { from: vec![peer("web", "shop")], to: vec![] };
    let allow = access(Some(vec![rule]), vec![]);
    let (here, there) = (WorkloadId::new("td", "shop", "web"), WorkloadId::new("td", "dev", "web"));
    assert!(allow.decide(&subject(Some(&here))).allowed);
    assert!(!allow.decide(&subject(Some(&there))).allowed);
    assert!(!allow.decide(&subject(None)).allowed);
}

#[test]
fn a_rule_that_needs_http_denies_an_opaque_connection_and_never_allows_one() {
    assert!(!access(None, path("/admin/**")).decide(&subject(None)).allowed);
    assert!(!access(Some(path("/admin/**")), vec![]).decide(&subject(None)).allowed);
}

/// The rules of `tests/spellings.txt`.
const RULES: [(char, &str); 4] =
    [('A', "/admin/**"), ('D', "/v1/*:delete"), ('E', "/metrics"), ('P', "/api/v1/*")];

#[test]
fn every_spelling_in_the_table_is_decided_as_written_there() {
    let lines = include_str!("../../tests/spellings.txt").lines().filter(|line| !line.starts_with('#'));
    let mut spellings = 0;
    for line in lines {
        let [target, denied, allowed] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("not three columns: {line}");
        };
        spellings += 1;
        for (name, pattern) in RULES {
            let deny = request(&access(None, path(pattern)), "GET", target);
            assert_eq!(!deny.allowed, denied.contains(name), "deny of {pattern}: {target}");
            let allow = request(&access(Some(path(pattern)), vec![]), "GET", target);
            assert_eq!(allow.allowed, allowed.contains(name), "allow of {pattern}: {target}");
        }
    }
    assert!(spellings >= 50, "{spellings} spellings");
}

#[test]
fn a_method_is_denied_in_any_case_and_allowed_as_it_is_written() {
    let delete = || to(proto::Operation { methods: vec!["DELETE".into()], ..Default::default() });
    for method in ["DELETE", "delete", "Delete"] {
        assert!(!request(&access(None, delete()), method, "/x").allowed, "{method}");
        assert_eq!(request(&access(Some(delete()), vec![]), method, "/x").allowed, method == "DELETE");
    }
    assert!(request(&access(None, delete()), "DELETED", "/x").allowed);
}

#[test]
fn a_tunnel_is_denied_by_every_rule_that_its_content_may_break_and_allowed_by_its_own_method() {
    let method = |method: &str| to(proto::Operation { methods: vec![method.into()], ..Default::default() });
    let connect = |access: Access| request(&access, "CONNECT", "web:443");
    assert_eq!(connect(access(None, path("/admin/**"))).reason, Reason::DenyRule(0));
    assert_eq!(connect(access(None, method("DELETE"))).reason, Reason::DenyRule(0));
    let elsewhere = proto::Operation { paths: vec!["/a".into()], ports: vec![9], ..Default::default() };
    assert!(connect(access(None, to(elsewhere))).allowed, "another port");
    assert!(connect(access(Some(method("CONNECT")), vec![])).allowed);
    assert!(!connect(access(Some(method("GET")), vec![])).allowed);
    assert!(!connect(access(Some(path("/public/**")), vec![])).allowed);
}

#[test]
fn a_path_is_read_only_for_a_rule_whose_other_conditions_hold() {
    let read = Cell::new(0);
    let found = readings("/admin/x");
    let readings = || {
        read.set(read.get() + 1);
        &found
    };
    let http = Some(Http { method: "GET", readings: &readings });
    let post = proto::Operation {
        methods: vec!["POST".into()],
        paths: vec!["/admin/**".into()],
        ..Default::default()
    };
    assert!(access(None, to(post)).decide(&Subject { http, ..subject(None) }).allowed);
    assert_eq!(read.get(), 0);
    assert!(!access(None, path("/admin/**")).decide(&Subject { http, ..subject(None) }).allowed);
    assert!(read.get() > 0);
}

#[test]
fn a_path_with_too_many_readings_is_denied_and_not_allowed() {
    let target = "/x/%25252e%2e/./a//b;c/%2F/..%5c..%3B/%23/%3F/%00/%20/%FF";
    let denied = request(&access(None, path("/other")), "GET", target);
    assert_eq!(denied, Decision { allowed: false, reason: Reason::AmbiguousPath });
    assert!(!request(&access(Some(path("/**")), vec![]), "GET", target).allowed);
    let delete = to(proto::Operation { methods: vec!["DELETE".into()], ..Default::default() });
    assert!(request(&access(None, delete), "GET", target).allowed, "no rule looks at its path");
}

#[test]
fn each_reading_of_an_allowed_path_may_match_another_pattern() {
    let both =
        to(proto::Operation { paths: vec!["/files/*".into(), "/files/*/*".into()], ..Default::default() });
    assert!(request(&access(Some(both), vec![]), "GET", "/files/a%2Fb").allowed);
}

#[test]
fn addresses_mapped_into_ipv6_match_their_ipv4_range() {
    let rule = proto::Rule {
        from: vec![proto::Peer { cidr: "10.1.0.0/16".into(), ..Default::default() }],
        to: vec![],
    };
    let allow = access(Some(vec![rule]), vec![]);
    let mut mapped = subject(None);
    mapped.address = "::ffff:10.1.2.3".parse().unwrap();
    assert!(allow.decide(&mapped).allowed);
}

#[test]
fn values_that_cannot_be_enforced_are_refused_whole() {
    let with = |peer, operation| proto::Access {
        deny: vec![proto::Rule { from: vec![peer], to: vec![operation] }],
        ..Default::default()
    };
    let operation = proto::Operation::default();
    let cidr = proto::Peer { cidr: "10.1".into(), ..Default::default() };
    assert_eq!(Access::compile(&with(cidr, operation.clone())).unwrap_err(), RuleError::Cidr("10.1".into()));
    assert_eq!(Access::compile(&with(peer("", ""), operation)).unwrap_err(), RuleError::EmptyPeer);
    let path = proto::Operation { paths: vec!["/a//b".into()], ..Default::default() };
    assert!(matches!(Access::compile(&with(peer("a", "b"), path)), Err(RuleError::Path(_))));
}
