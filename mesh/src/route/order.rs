//! The precedence of the Gateway API over the matches of all routes of one address.
//!
//! HTTP: an exact path, then the longest path, then a method, then the most headers, then the most query parameters.
//! gRPC: the longest service, then the longest method, then the most headers. TLS and TCP: no difference (server names
//! are compared when a connection comes, [`super::Matcher::find_server_name`]). What is still equal: the oldest route,
//! then `namespace/name` in alphabetical order, then the rule's place in its route, then the match's place in its
//! rule.
//!
//! The Gateway API leaves regular expressions of paths to the implementation. Here one counts as a prefix of its
//! pattern's length, and comes behind a prefix of the same length. So `/v[0-9]+/.*` comes before the catch-all `/`, and
//! an author who needs the other order writes the longer one.

use std::cmp::{Ordering, Reverse};

use crate::proto::value_match::Type;
use crate::proto::{Match, RouteKind, ValueMatch};

/// A match of one route, with what decides about its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The match.
    pub m: Match,
    /// When the route was created, in seconds since 1970.
    pub created: i64,
    /// Namespace and name of the route.
    pub route: (String, String),
    /// Index of the rule in its route.
    pub rule: usize,
    /// Of the route. All candidates of one address have the same; of several kinds, gRPC comes first, then HTTP, TLS
    /// and TCP.
    pub kind: RouteKind,
}

/// Sorts matches by their precedence, the first to be tried first. Equal ones keep their order.
pub fn order(matches: &mut [Candidate]) {
    matches.sort_by(compare);
}

fn compare(a: &Candidate, b: &Candidate) -> Ordering {
    rank(a.kind)
        .cmp(&rank(b.kind))
        .then_with(|| match a.kind {
            RouteKind::Http => http(&a.m, &b.m),
            RouteKind::Grpc => grpc(&a.m, &b.m),
            RouteKind::Tls | RouteKind::Tcp | RouteKind::Unspecified => Ordering::Equal,
        })
        .then_with(|| a.created.cmp(&b.created))
        .then_with(|| full_name(a).cmp(full_name(b)))
        .then_with(|| a.rule.cmp(&b.rule))
}

fn rank(kind: RouteKind) -> u8 {
    match kind {
        RouteKind::Grpc => 0,
        RouteKind::Http => 1,
        RouteKind::Tls => 2,
        RouteKind::Tcp => 3,
        RouteKind::Unspecified => 4,
    }
}

/// The bytes of `namespace/name`. Not the pair: `a-b/x` comes before `a/x`, because `-` comes before `/`.
fn full_name(candidate: &Candidate) -> impl Iterator<Item = u8> {
    let (namespace, name) = &candidate.route;
    namespace.bytes().chain([b'/']).chain(name.bytes())
}

fn http(a: &Match, b: &Match) -> Ordering {
    let specificity = |m: &Match| {
        (
            PathSpecificity::of(m.path.as_ref()),
            !m.method.is_empty(),
            distinct(&m.headers, |a, b| a.eq_ignore_ascii_case(b)),
            distinct(&m.query, |a, b| a == b),
        )
    };
    Reverse(specificity(a)).cmp(&Reverse(specificity(b)))
}

fn grpc(a: &Match, b: &Match) -> Ordering {
    let length = |value: &Option<ValueMatch>| value.as_ref().map_or(0, |value| value.value.chars().count());
    let specificity = |m: &Match| {
        (
            length(&m.grpc_service),
            length(&m.grpc_method),
            distinct(&m.headers, |a, b| a.eq_ignore_ascii_case(b)),
        )
    };
    Reverse(specificity(a)).cmp(&Reverse(specificity(b)))
}

/// How specific a path is; the fields in the order in which they decide.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct PathSpecificity {
    exact: bool,
    chars: usize,
    prefix: bool,
}

impl PathSpecificity {
    fn of(path: Option<&ValueMatch>) -> Self {
        // An absent path is any path, as the prefix `/` is.
        let Some(path) = path else { return Self { exact: false, chars: 0, prefix: true } };
        let prefix = path.r#type == Type::Prefix as i32;
        let value = if prefix { path.value.trim_end_matches('/') } else { path.value.as_str() };
        Self { exact: path.r#type == Type::Exact as i32, chars: value.chars().count(), prefix }
    }
}

/// How many names there are: of several matches with one name only the first counts.
fn distinct(matches: &[ValueMatch], same: impl Fn(&str, &str) -> bool) -> usize {
    let known = |index: usize, name: &str| matches.iter().take(index).any(|m| same(&m.name, name));
    matches.iter().enumerate().filter(|(index, m)| !known(*index, &m.name)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(type_: Type, name: &str, value: &str) -> ValueMatch {
        ValueMatch { r#type: type_ as i32, name: name.to_owned(), value: value.to_owned() }
    }

    fn path(type_: Type, path: &str) -> Match {
        Match { path: Some(value(type_, "", path)), ..Match::default() }
    }

    fn grpc_call(service: &str, method: &str) -> Match {
        let any_or = |text: &str| (!text.is_empty()).then(|| value(Type::Exact, "", text));
        Match { grpc_service: any_or(service), grpc_method: any_or(method), ..Match::default() }
    }

    fn with_headers(mut m: Match, names: &[&str]) -> Match {
        m.headers = names.iter().map(|name| value(Type::Exact, name, "x")).collect();
        m
    }

    fn with_query(mut m: Match, names: &[&str]) -> Match {
        m.query = names.iter().map(|name| value(Type::Exact, name, "x")).collect();
        m
    }

    fn candidate(kind: RouteKind, m: Match) -> Candidate {
        Candidate { m, created: 0, route: ("shop".to_owned(), "web".to_owned()), rule: 0, kind }
    }

    /// Candidates in their right order come back in it, however they were shuffled.
    #[track_caller]
    fn assert_ordered(expected: Vec<Candidate>) {
        for shift in 0..expected.len() {
            let mut shuffled: Vec<_> = expected.iter().rev().cloned().collect();
            shuffled.rotate_left(shift);
            order(&mut shuffled);
            assert_eq!(shuffled, expected);
        }
    }

    #[test]
    fn an_exact_path_comes_first_and_then_the_longest_one() {
        let any = Match { method: "GET".to_owned(), ..path(Type::Prefix, "/") };
        let matches = [
            path(Type::Exact, "/a"),
            path(Type::Regex, "/a/[^/]+/orders"),
            path(Type::Prefix, "/abcdefgh"),
            path(Type::Regex, "/a[bcde]f"),
            path(Type::Prefix, "/ab"),
            path(Type::Prefix, "/a/"),
            any,
            path(Type::Prefix, "/"),
        ];
        assert_ordered(matches.map(|m| candidate(RouteKind::Http, m)).to_vec());
    }

    #[test]
    fn a_prefix_comes_before_a_regular_expression_of_the_same_length() {
        let matches = [path(Type::Prefix, "/abc"), path(Type::Regex, "/a.+")];
        assert_ordered(matches.map(|m| candidate(RouteKind::Http, m)).to_vec());
    }

    #[test]
    fn of_equal_paths_a_method_comes_before_headers_and_these_before_query_parameters() {
        let a = || path(Type::Prefix, "/a");
        let matches = [
            Match { method: "GET".to_owned(), ..a() },
            with_headers(a(), &["x", "y"]),
            with_query(with_headers(a(), &["x"]), &["p", "q"]),
            with_query(with_headers(a(), &["x"]), &["p"]),
            with_headers(a(), &["x"]),
            with_query(a(), &["p", "q", "r"]),
            a(),
        ];
        assert_ordered(matches.map(|m| candidate(RouteKind::Http, m)).to_vec());
    }

    #[test]
    fn a_repeated_name_does_not_make_a_match_more_specific() {
        let mut matches = vec![
            candidate(RouteKind::Http, with_headers(path(Type::Prefix, "/"), &["X-a", "x-A", "x-a"])),
            candidate(RouteKind::Http, with_headers(path(Type::Prefix, "/"), &["x-a", "x-b"])),
        ];
        order(&mut matches);
        assert_eq!(matches[0].m.headers.len(), 2);
    }

    #[test]
    fn an_absent_path_is_as_specific_as_the_root() {
        let mut matches = vec![
            candidate(RouteKind::Http, Match::default()),
            candidate(RouteKind::Http, path(Type::Prefix, "/")),
        ];
        let before = matches.clone();
        order(&mut matches);
        assert_eq!(matches, before);
        matches.push(candidate(RouteKind::Http, with_headers(path(Type::Prefix, "/"), &["x"])));
        order(&mut matches);
        assert_eq!(matches[0].m.headers.len(), 1);
    }

    #[test]
    fn of_grpc_the_longest_service_comes_first_then_the_longest_method_then_the_most_headers() {
        let matches = [
            grpc_call("shop.v1.Orders", ""),
            grpc_call("shop.Orders", "CreateAll"),
            with_headers(grpc_call("shop.Orders", "Create"), &["x", "y"]),
            with_headers(grpc_call("shop.Orders", "Create"), &["x"]),
            grpc_call("shop.Orders", "Create"),
            grpc_call("shop.Orders", ""),
            grpc_call("", "Create"),
            grpc_call("", ""),
        ];
        assert_ordered(matches.map(|m| candidate(RouteKind::Grpc, m)).to_vec());
    }

    #[test]
    fn what_is_equal_is_ordered_by_age_then_by_name_then_by_rule() {
        let of = |created, namespace: &str, name: &str, rule| Candidate {
            created,
            route: (namespace.to_owned(), name.to_owned()),
            rule,
            ..candidate(RouteKind::Http, path(Type::Prefix, "/a"))
        };
        assert_ordered(vec![
            of(1, "z", "z", 9),
            of(2, "a-b", "x", 0),
            of(2, "a", "x", 0),
            of(2, "a", "x", 1),
            of(2, "a", "y", 0),
            of(2, "b", "a", 0),
        ]);
        for kind in [RouteKind::Grpc, RouteKind::Tls, RouteKind::Tcp] {
            let old = Candidate { created: 1, ..candidate(kind, Match::default()) };
            assert_ordered(vec![old, Candidate { created: 2, ..candidate(kind, Match::default()) }]);
        }
    }

    #[test]
    fn matches_of_one_rule_keep_their_order() {
        let mut matches = ["one", "two", "three"].map(|value_| {
            let header = value(Type::Exact, "x", value_);
            let m = Match { headers: vec![header], ..path(Type::Prefix, "/") };
            candidate(RouteKind::Http, m)
        });
        let before = matches.clone();
        order(&mut matches);
        assert_eq!(matches, before);
    }
}
