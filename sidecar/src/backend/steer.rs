//! Which version a request is meant for while a Canary steers.
//!
//! In: the steering of a backend's endpoints and the head of one request. Out: the cohort that the pick honours, a
//! cookie for a user that has none yet, whether a copy goes to the version on trial, and whether the request is
//! compared. Never looks at endpoints: a cohort whose version has no ready endpoint is served by another one.
//!
//! A match decides before the share. A user with the cookie has a fixed point between 0 and 1, and the version on trial
//! gets those below its share: as it grows, users come to it and none leaves. The cookie holds a random number and not
//! the point, which is drawn anew for each version on trial, so that it is not always the same users who try first.
//! Clients that keep no cookies are spread by share, request by request. A cookie of the same name that the application
//! has set stays as it is: its value stands for the user then.
//!
//! Only like is compared with like. Where the version on trial has a share, chance decides who gets it, and only such
//! requests are evidence: those of insiders, and copies, of which there are none of a POST, are of another kind, and many
//! of them would hide what all others get. In a step of copies alone these are compared with what could have been copied.
//! In a step of a match alone there is nothing better than to compare insiders with all others.

use bytes::Bytes;

use super::Cohort;
use crate::config::{Steering, SteeringMatch, TrialShare};
use crate::http1::{Head, Start};

/// What becomes of one request.
#[derive(Debug)]
pub struct Steered {
    /// Which endpoints it may go to.
    pub cohort: Cohort,
    /// The value of a `set-cookie` line for its answer.
    pub set_cookie: Option<Bytes>,
    /// A copy of it goes to the version on trial, unless that serves it.
    pub mirror: bool,
    /// Attempts at it are evidence for the version of their endpoint.
    pub compared: bool,
}

/// Decides about one request.
pub fn steer(steering: &Steering, head: &Head) -> Steered {
    decide(steering, head, || fastrand::u64(..))
}

fn decide(steering: &Steering, head: &Head, mut random: impl FnMut() -> u64) -> Steered {
    if steering.matches.iter().any(|wanted| matches(wanted, head)) {
        let compared = is_compared(steering, head, true);
        return Steered { cohort: Cohort::OnTrial, set_cookie: None, mirror: false, compared };
    }
    let compared = is_compared(steering, head, false);
    let mirror = steering.mirror_permille > 0
        && may_be_copied(head)
        && random() % 1000 < u64::from(steering.mirror_permille);
    let Some(name) = &steering.sticky else {
        return Steered { cohort: Cohort::ByShare, set_cookie: None, mirror, compared };
    };
    let foreign = || head.cookies(name).find(|value| !value.is_empty()).map(fnv);
    let known = head.cookies(name).find_map(user_of).or_else(foreign);
    let user = known.unwrap_or_else(&mut random);
    let set_cookie =
        known.is_none().then(|| format!("{name}={user:016x}; Path=/; HttpOnly; SameSite=Lax").into());
    Steered { cohort: Cohort::Point(point(user, &steering.revision)), set_cookie, mirror, compared }
}

/// Whether a request is of the kind by which the versions are compared now, see above.
fn is_compared(steering: &Steering, head: &Head, matched: bool) -> bool {
    match steering.share {
        TrialShare::All => true,
        TrialShare::Part => !matched,
        TrialShare::None if steering.compares_copies() => !matched && may_be_copied(head),
        TrialShare::None => true,
    }
}

fn matches(wanted: &SteeringMatch, head: &Head) -> bool {
    match wanted {
        SteeringMatch::Header { name, value } => {
            let mut lines =
                head.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name.as_bytes()));
            lines.any(|(_, found)| **found == *value.as_bytes())
        }
        SteeringMatch::Cookie { name, value } => head.cookies(name).any(|found| found == value.as_bytes()),
    }
}

/// Both versions carry out a request that is copied. Methods that promise to change nothing (RFC 9110 §9.2.1) may be;
/// what else a path does, only its application knows. A tunnel has no answer that could be dropped.
fn may_be_copied(head: &Head) -> bool {
    match &head.start {
        Start::Request { method, .. } => !head.upgrade && matches!(&**method, b"GET" | b"HEAD" | b"OPTIONS"),
        Start::Response { .. } => false,
    }
}

/// The number in a cookie: sixteen lower-case hexadecimal digits, as they are set. Any other value is the application's.
fn user_of(value: &[u8]) -> Option<u64> {
    let digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let text = std::str::from_utf8(value).ok()?;
    let valid = text.len() == 16 && value.iter().all(digit);
    u64::from_str_radix(text, 16).ok().filter(|_| valid)
}

/// Where a user stands among all, from 0 to 1, for this version on trial. The same in every sidecar and every build: a
/// user may come by way of several, so a hasher of the standard library, which may change, would not do.
fn point(user: u64, revision: &str) -> f64 {
    // The finalizer of SplitMix64, without which similar numbers would have similar points.
    let mut mixed = user ^ fnv(revision.as_bytes());
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::Framing;

    fn steering(matches: Vec<SteeringMatch>, mirror_permille: u32, sticky: Option<&str>) -> Steering {
        let sticky = sticky.map(Into::into);
        Steering { revision: "r2".into(), matches, mirror_permille, sticky, ..Steering::default() }
    }

    fn header(name: &str, value: &str) -> SteeringMatch {
        SteeringMatch::Header { name: name.into(), value: value.into() }
    }

    fn cookie(name: &str, value: &str) -> SteeringMatch {
        SteeringMatch::Cookie { name: name.into(), value: value.into() }
    }

    fn request(method: &'static str, lines: &[(&'static str, &str)]) -> Head {
        let line = |(name, value): &(&'static str, &str)| {
            (Bytes::from_static(name.as_bytes()), Bytes::copy_from_slice(value.as_bytes()))
        };
        Head {
            start: Start::Request {
                method: Bytes::from_static(method.as_bytes()),
                target: Bytes::from_static(b"/"),
            },
            headers: lines.iter().map(line).collect(),
            framing: Framing::None,
            keep_alive: true,
            upgrade: false,
            expects_continue: false,
            http10: false,
        }
    }

    fn is_on_trial(steering: &Steering, lines: &[(&'static str, &str)]) -> bool {
        matches!(decide(steering, &request("GET", lines), || 0).cohort, Cohort::OnTrial)
    }

    /// The point of a request with this cookie, and what is set.
    fn sticks(steering: &Steering, cookie: &str) -> (f64, Option<String>) {
        let steered = decide(steering, &request("GET", &[("Cookie", cookie)]), || 7);
        let Cohort::Point(point) = steered.cohort else { panic!("not a point: {steered:?}") };
        (point, steered.set_cookie.map(|value| String::from_utf8(value.to_vec()).unwrap()))
    }

    #[test]
    fn a_header_matches_by_its_exact_value_in_any_of_its_lines() {
        let steering = steering(vec![header("x-group", "insider")], 0, None);
        assert!(is_on_trial(&steering, &[("X-Group", "other"), ("X-GROUP", "insider")]));
        for value in ["Insider", "insider2", "insider, other", ""] {
            assert!(!is_on_trial(&steering, &[("x-group", value)]), "{value}");
        }
        assert!(!is_on_trial(&steering, &[("x-groups", "insider")]));
    }

    #[test]
    fn a_cookie_matches_among_others_and_over_several_lines() {
        let steering = steering(vec![header("x-group", "insider"), cookie("group", "beta")], 0, None);
        for value in ["group=beta", "a=b; group=beta", "group=alpha;group=beta;c", "group = beta "] {
            assert!(is_on_trial(&steering, &[("cookie", value)]), "{value}");
        }
        assert!(is_on_trial(&steering, &[("cookie", "a=b"), ("cookie", "group=beta")]));
        for value in ["group=betas", "xgroup=beta", "group", "a=group=beta", "Group=beta"] {
            assert!(!is_on_trial(&steering, &[("cookie", value)]), "{value}");
        }
    }

    #[test]
    fn a_match_beats_the_share_and_neither_sets_a_cookie_nor_is_copied() {
        let steering = steering(vec![header("x-group", "insider")], 1000, Some("version"));
        let steered = decide(&steering, &request("GET", &[("x-group", "insider")]), || 0);
        assert!(matches!(steered.cohort, Cohort::OnTrial));
        assert_eq!((steered.set_cookie, steered.mirror), (None, false));
    }

    #[test]
    fn only_requests_that_change_nothing_are_copied_and_only_so_many_of_them() {
        let steering = steering(Vec::new(), 200, None);
        for (method, copied) in [
            ("GET", true),
            ("HEAD", true),
            ("OPTIONS", true),
            ("POST", false),
            ("DELETE", false),
            ("get", false),
        ] {
            assert_eq!(decide(&steering, &request(method, &[]), || 199).mirror, copied, "{method}");
            assert!(!decide(&steering, &request(method, &[]), || 200).mirror, "{method}");
        }
        let tunnel = Head { upgrade: true, ..request("GET", &[]) };
        assert!(!decide(&steering, &tunnel, || 0).mirror);
    }

    #[test]
    fn only_requests_of_one_kind_are_compared() {
        let insider = || vec![header("x-group", "insider")];
        // The share, the match, copies; then whether a request is compared that matches, a GET and a POST that do not.
        for (share, matches, mirror, expected) in [
            (TrialShare::None, insider(), 0, [true, true, true]),
            (TrialShare::None, Vec::new(), 200, [true, true, false]),
            (TrialShare::None, insider(), 200, [false, true, false]),
            (TrialShare::Part, insider(), 0, [false, true, true]),
            (TrialShare::Part, insider(), 200, [false, true, true]),
            (TrialShare::All, insider(), 0, [true, true, true]),
        ] {
            let steering = Steering { share, ..steering(matches, mirror, None) };
            let compared = |method, lines: &[_]| decide(&steering, &request(method, lines), || 0).compared;
            let seen = [
                compared("GET", &[("x-group", "insider")]),
                compared("GET", &[]),
                compared("POST", &[("x-group", "other")]),
            ];
            assert_eq!(seen, expected, "{steering:?}");
        }
    }

    #[test]
    fn without_a_cookie_of_its_own_a_steering_leaves_requests_to_the_share() {
        let steered = decide(&steering(Vec::new(), 200, None), &request("GET", &[("cookie", "a=b")]), || 0);
        assert!(matches!(steered.cohort, Cohort::ByShare));
        assert_eq!(steered.set_cookie, None);
    }

    #[test]
    fn a_user_without_a_cookie_gets_one_and_keeps_the_point_that_it_stands_for() {
        let steering = steering(Vec::new(), 0, Some("version"));
        let (first, set) = sticks(&steering, "a=b");
        assert_eq!(set.as_deref(), Some("version=0000000000000007; Path=/; HttpOnly; SameSite=Lax"));
        let (again, set) = sticks(&steering, "a=b; version=0000000000000007");
        assert_eq!((again, set), (first, None));
    }

    #[test]
    fn a_cookie_of_the_application_stands_for_its_user_and_is_not_overwritten() {
        let steering = steering(Vec::new(), 0, Some("version"));
        let mut points = Vec::new();
        for value in
            ["version=7", "version=000000000000000G", "version=000000000000000A", "version=+000000000000007"]
        {
            let (point, set) = sticks(&steering, value);
            assert_eq!((sticks(&steering, value).0, set), (point, None), "{value}");
            points.push(point);
        }
        points.sort_by(f64::total_cmp);
        assert!(points.windows(2).all(|two| two[0] < two[1]), "other values, other users: {points:?}");
        assert!(sticks(&steering, "version=").1.is_some(), "it says nothing");
        let ours = sticks(&steering, "version=0000000000000001");
        assert_eq!(sticks(&steering, "version=x; version=0000000000000001"), ours, "as of two paths");
    }

    #[test]
    fn points_are_spread_evenly_and_drawn_anew_for_each_version() {
        let of = |revision: &str| -> Vec<f64> { (0..10_000).map(|user| point(user, revision)).collect() };
        let (one, other) = (of("r2"), of("r3"));
        assert!(one.iter().all(|point| (0.0..1.0).contains(point)));
        for share in [0.01, 0.05, 0.5] {
            let users = one.iter().filter(|point| **point < share).count() as f64 / 10_000.0;
            assert!((users - share).abs() < 0.01, "{users} of the users for a share of {share}");
        }
        let both = one.iter().zip(&other).filter(|(a, b)| **a < 0.5 && **b < 0.5).count();
        assert!((2_200..2_800).contains(&both), "{both} of 10000 try both versions first");
    }

    #[test]
    fn a_point_is_the_same_in_every_build() {
        for (user, revision, expected) in [(7, "r2", 0.492_274_527_091), (1, "59d8f7", 0.964_705_481_198)] {
            let found = point(user, revision);
            assert!((found - expected).abs() < 1e-11, "{found} instead of {expected}");
        }
    }
}
