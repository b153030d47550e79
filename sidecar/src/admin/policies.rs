//! What policies and rules of routes say, as `/config` shows it: under the names that their objects use, so that the two
//! can be compared. What is not set is left out.

use std::time::Duration;

use serde_json::{Value, json};

use crate::config::limits::{InboundLimits, Limit, LimitSet};
use crate::config::traffic::{
    Balance, BalanceBy, Breaker, Faults, HashKey, Retries, Timeouts, Traffic, ZonePolicy,
};
use crate::config::{Rule, RuleRetry, RuleTimes};
use crate::gate::Gate;
use crate::telemetry::Breakers;

/// An object with the fields that are set.
fn object(fields: impl IntoIterator<Item = (&'static str, Option<Value>)>) -> Value {
    let set = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(set.collect())
}

/// The sections for calls to a Service.
pub(super) fn traffic(traffic: &Traffic) -> Value {
    object([
        ("timeout", traffic.timeout.as_ref().map(timeouts)),
        ("retry", traffic.retry.as_ref().map(retries)),
        ("breaker", traffic.breaker.as_ref().map(breaker)),
        ("balance", traffic.balance.as_ref().map(balance)),
        ("faults", traffic.faults.as_ref().map(faults)),
    ])
}

/// The limits of this pod, and how much of each is in use.
pub(super) fn limits(limits: &InboundLimits) -> Value {
    let set = |set: &LimitSet| {
        object([
            ("concurrency", set.concurrency.as_ref().map(|of| limit(of, &limits.in_use.requests))),
            ("connections", set.connections.as_ref().map(|of| limit(of, &limits.in_use.connections))),
        ])
    };
    json!({"enforced": set(&limits.section.enforced), "shadow": set(&limits.section.shadow)})
}

/// A rule of a route, with the times that it sets.
pub(super) fn rule(rule: &Rule) -> Value {
    let RuleTimes { request, attempt, retry } = &rule.times;
    let timeout = object([("request", request.map(bound)), ("attempt", attempt.map(bound))]);
    object([
        ("route", Some(json!(&*rule.route))),
        ("rule", Some(json!(&*rule.name))),
        ("timeout", (request.is_some() || attempt.is_some()).then_some(timeout)),
        ("retry", retry.as_ref().map(rule_retry)),
    ])
}

/// The endpoints of a Service that breakers have ejected, and in how many data threads each is.
pub(super) fn ejected(breakers: &Breakers, namespace: &str, service: &str) -> Value {
    let gauge = breakers.find(namespace, service);
    let endpoints = gauge.map(|gauge| gauge.endpoints()).unwrap_or_default();
    endpoints.into_iter().map(|(address, threads)| json!({"address": address, "threads": threads})).collect()
}

fn limit(limit: &Limit, gate: &Gate) -> Value {
    json!({"max": limit.max, "policy": &*limit.policy, "inUse": gate.taken()})
}

fn timeouts(timeouts: &Timeouts) -> Value {
    object([
        ("request", timeouts.request.map(span)),
        ("attempt", timeouts.attempt.map(span)),
        ("idle", timeouts.idle.map(span)),
    ])
}

fn retries(retries: &Retries) -> Value {
    let reasons = [
        ("5xx", retries.on.server_error),
        ("unavailable", retries.on.unavailable),
        ("reset", retries.on.reset),
        ("connect", retries.on.connect),
    ];
    let on: Vec<&str> = reasons.into_iter().filter_map(|(name, is_set)| is_set.then_some(name)).collect();
    json!({"on": on, "attempts": retries.attempts, "budget": format!("{}%", retries.budget_percent)})
}

fn rule_retry(retry: &RuleRetry) -> Value {
    json!({"codes": retry.codes, "attempts": retry.attempts, "backoff": span(retry.backoff)})
}

fn breaker(breaker: &Breaker) -> Value {
    json!({
        "consecutiveFailures": breaker.consecutive_failures.unwrap_or(0),
        "ejectFor": span(breaker.eject_for),
        "maxEjected": format!("{}%", breaker.max_ejected_percent),
    })
}

fn balance(balance: &Balance) -> Value {
    let (by, hash) = match &balance.by {
        BalanceBy::Latency => ("Latency", None),
        BalanceBy::Requests => ("Requests", None),
        BalanceBy::RoundRobin => ("RoundRobin", None),
        BalanceBy::Hash(HashKey::Header(name)) => ("Hash", Some(json!({"header": &**name}))),
        BalanceBy::Hash(HashKey::Cookie(name)) => ("Hash", Some(json!({"cookie": &**name}))),
        BalanceBy::Hash(HashKey::Source) => ("Hash", Some(json!({"sourceIp": true}))),
    };
    let zone = match balance.zone {
        ZonePolicy::Unset => None,
        ZonePolicy::Any => Some("Any"),
        ZonePolicy::Prefer => Some("Prefer"),
        ZonePolicy::Only => Some("Only"),
    };
    object([
        ("by", Some(json!(by))),
        ("hash", hash),
        ("zone", zone.map(|zone| json!(zone))),
        ("warmUp", balance.warm_up.map(span)),
    ])
}

fn faults(faults: &Faults) -> Value {
    let delay = faults.delay.map(|delay| json!({"by": span(delay.by), "of": share(delay.permyriad)}));
    let abort = faults.abort.map(|abort| json!({"status": abort.status, "of": share(abort.permyriad)}));
    object([("delay", delay), ("abort", abort), ("untilUnix", Some(json!(faults.until_unix)))])
}

fn span(span: Duration) -> Value {
    json!(format!("{span:?}"))
}

/// What a rule sets; `None`: no limit, which routes write as 0s.
fn bound(limit: Option<Duration>) -> Value {
    limit.map_or_else(|| json!("0s"), span)
}

fn share(permyriad: u32) -> Value {
    json!(format!("{}%", f64::from(permyriad) / 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::limits::{InUse, LimitsSection};
    use crate::config::traffic::{Abort, Delay, RetryOn};

    #[test]
    fn every_section_is_shown_as_its_policy_writes_it() {
        let all = Traffic {
            timeout: Some(Timeouts {
                request: Some(Duration::from_secs(2)),
                attempt: Some(Duration::from_millis(500)),
                idle: None,
            }),
            retry: Some(Retries {
                on: RetryOn { server_error: true, connect: true, ..RetryOn::default() },
                attempts: 2,
                budget_percent: 20,
            }),
            breaker: Some(Breaker {
                consecutive_failures: Some(5),
                eject_for: Duration::from_secs(10),
                max_ejected_percent: 50,
            }),
            balance: Some(Balance {
                by: BalanceBy::Hash(HashKey::Cookie("session".into())),
                zone: ZonePolicy::Any,
                warm_up: Some(Duration::from_secs(30)),
            }),
            faults: Some(Faults {
                delay: Some(Delay { by: Duration::from_millis(200), permyriad: 500 }),
                abort: Some(Abort { status: 503, permyriad: 50 }),
                until_unix: 7,
            }),
        };
        let expected = json!({
            "timeout": {"request": "2s", "attempt": "500ms"},
            "retry": {"on": ["5xx", "connect"], "attempts": 2, "budget": "20%"},
            "breaker": {"consecutiveFailures": 5, "ejectFor": "10s", "maxEjected": "50%"},
            "balance": {"by": "Hash", "hash": {"cookie": "session"}, "zone": "Any", "warmUp": "30s"},
            "faults": {
                "delay": {"by": "200ms", "of": "5%"}, "abort": {"status": 503, "of": "0.5%"}, "untilUnix": 7,
            },
        });
        assert_eq!(traffic(&all), expected);
        assert_eq!(traffic(&Traffic::default()), json!({}));
    }

    #[test]
    fn a_limit_is_shown_with_what_is_in_use_of_it() {
        let most = |max| Some(Limit { max, policy: "shop/calm".into() });
        let section = LimitsSection {
            enforced: LimitSet { concurrency: most(64), connections: None },
            shadow: LimitSet { concurrency: None, connections: most(9) },
        };
        let shown = InboundLimits { section, in_use: InUse::default() };
        let _one = shown.in_use.requests.enter(64).unwrap();
        let expected = json!({
            "enforced": {"concurrency": {"max": 64, "policy": "shop/calm", "inUse": 1}},
            "shadow": {"connections": {"max": 9, "policy": "shop/calm", "inUse": 0}},
        });
        assert_eq!(limits(&shown), expected);
    }

    #[test]
    fn the_times_of_a_rule_are_shown_and_those_that_it_leaves_to_the_policy_are_not() {
        let of = |times: RuleTimes| Rule {
            route: "HTTPRoute/shop/web".into(),
            name: "all".into(),
            filters: Vec::new(),
            backends: Vec::new(),
            times,
            session: None,
        };
        let named = json!({"route": "HTTPRoute/shop/web", "rule": "all"});
        assert_eq!(rule(&of(RuleTimes::default())), named);
        let retry = RuleRetry { codes: vec![503], attempts: 1, backoff: Duration::from_millis(25) };
        let times = RuleTimes {
            request: Some(None),
            attempt: Some(Some(Duration::from_secs(1))),
            retry: Some(retry),
        };
        let shown = rule(&of(times));
        assert_eq!(shown["timeout"], json!({"request": "0s", "attempt": "1s"}));
        assert_eq!(shown["retry"], json!({"codes": [503], "attempts": 1, "backoff": "25ms"}));
    }
}
