//! Sections of MeshPolicies for clients: timeouts, retries, breaker, balancing and faults of one Service, as they are
//! used. Each is what a policy says, and absent where none does; what holds then is decided where it is used.

use std::sync::Arc;
use std::time::Duration;

use tulle_mesh::proto;

use super::resource::Refused;

/// The sections that concern a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How long things may take.
    pub timeout: Option<Timeouts>,
    /// Which answers are asked for again.
    pub retry: Option<Retries>,
    /// When an endpoint is left alone for a while.
    pub breaker: Option<Breaker>,
    /// How an endpoint is chosen.
    pub balance: Option<Balance>,
    /// What is made to fail.
    pub faults: Option<Faults>,
}

/// How long things may take; `None`: as long as they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From the head of a request to the head of its answer, all attempts together.
    pub request: Option<Duration>,
    /// The same of one attempt.
    pub attempt: Option<Duration>,
    /// Without a byte in either direction, once the head of the answer has come.
    pub idle: Option<Duration>,
}

/// Which answers are asked for again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retries {
    /// What is retried.
    pub on: RetryOn,
    /// How often, beside the first attempt.
    pub attempts: u32,
    /// In percent of first attempts.
    pub budget_percent: u32,
}

/// What is retried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// Answers with a status from 500 on.
    pub server_error: bool,
    /// Connections and streams that break off before an answer, and attempts that take too long.
    pub reset: bool,
    /// Endpoints that cannot be reached.
    pub connect: bool,
    /// 503, and UNAVAILABLE of gRPC.
    pub unavailable: bool,
}

/// When an endpoint is left alone for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breaker {
    /// Failures in a row that eject an endpoint; `None`: nothing ejects one.
    pub consecutive_failures: Option<u32>,
    /// For how long, the first time.
    pub eject_for: Duration,
    /// How many may be ejected at a time, in percent of the endpoints.
    pub max_ejected_percent: u32,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// By what.
    pub by: BalanceBy,
    /// Whether those of the own zone come first.
    pub zone: ZonePolicy,
    /// How long an endpoint that has become ready gets less than its share; `None`: not at all.
    pub warm_up: Option<Duration>,
}

/// By what an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BalanceBy {
    /// Expected latency, load and success.
    #[default]
    Latency,
    /// Requests in flight.
    Requests,
    /// Turns.
    RoundRobin,
    /// Something that requests have in common.
    Hash(HashKey),
}

/// What requests have in common that go to the same endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// The value of a header.
    Header(Arc<str>),
    /// The value of a cookie.
    Cookie(Arc<str>),
    /// The client's address. Of requests that a sidecar sends that is its own pod.
    Source,
}

/// Whether endpoints of the own zone come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZonePolicy {
    /// As the Service's `trafficDistribution` says.
    #[default]
    Unset,
    /// All are alike, whatever the Service says.
    Any,
    /// They do, as long as they can take it.
    Prefer,
    /// No other is used.
    Only,
}

/// What is made to fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Attempts that wait.
    pub delay: Option<Delay>,
    /// Attempts that are answered with an error.
    pub abort: Option<Abort>,
    /// When that ends, in seconds since 1970.
    pub until_unix: i64,
}

/// Attempts that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// For how long.
    pub by: Duration,
    /// How many of 10,000.
    pub permyriad: u32,
}

/// Attempts that are answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// With this HTTP status.
    pub status: u16,
    /// How many of 10,000.
    pub permyriad: u32,
}

/// Decodes the sections of a Service.
///
/// # Errors
/// [`Refused`] for a value that this build does not know: half of a policy is not what its author wrote.
pub fn decode_traffic(traffic: Option<&proto::Traffic>) -> Result<Arc<Traffic>, Refused> {
    let Some(traffic) = traffic else { return Ok(Arc::default()) };
    Ok(Arc::new(Traffic {
        timeout: traffic.timeout.as_ref().map(|timeout| Timeouts {
            request: milliseconds(timeout.request_ms),
            attempt: milliseconds(timeout.attempt_ms),
            idle: milliseconds(timeout.idle_ms),
        }),
        retry: traffic.retry.as_ref().map(decode_retries).transpose()?,
        breaker: traffic.breaker.as_ref().map(|breaker| Breaker {
            consecutive_failures: Some(breaker.consecutive_failures).filter(|failures| *failures > 0),
            eject_for: Duration::from_millis(u64::from(breaker.eject_ms)),
            max_ejected_percent: breaker.max_ejected_percent.min(100),
        }),
        balance: traffic.balance.as_ref().map(decode_balance).transpose()?,
        faults: traffic.faults.as_ref().map(decode_faults).transpose()?,
    }))
}

/// A duration as it travels; 0 is none.
pub(super) fn milliseconds(ms: u32) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(u64::from(ms)))
}

fn decode_retries(retries: &proto::Retries) -> Result<Retries, Refused> {
    use proto::retries::On;
    let mut on = RetryOn::default();
    for value in &retries.on {
        match On::try_from(*value) {
            Ok(On::On5xx) => on.server_error = true,
            Ok(On::Reset) => on.reset = true,
            Ok(On::Connect) => on.connect = true,
            Ok(On::Unavailable) => on.unavailable = true,
            Ok(On::Unspecified) | Err(_) => {
                return Err(Refused(format!("unknown reason {value} to retry")));
            }
        }
    }
    Ok(Retries { on, attempts: retries.attempts, budget_percent: retries.budget_percent.min(100) })
}

fn decode_balance(balance: &proto::Balance) -> Result<Balance, Refused> {
    use proto::balance::{By, Zone};
    let named = |make: fn(Arc<str>) -> HashKey| match balance.hash_name.as_str() {
        "" => Err(Refused("balancing by a header or cookie without its name".to_owned())),
        name => Ok(BalanceBy::Hash(make(name.into()))),
    };
    let by = match By::try_from(balance.by) {
        Ok(By::Latency) => BalanceBy::Latency,
        Ok(By::Requests) => BalanceBy::Requests,
        Ok(By::RoundRobin) => BalanceBy::RoundRobin,
        Ok(By::HashHeader) => named(HashKey::Header)?,
        Ok(By::HashCookie) => named(HashKey::Cookie)?,
        Ok(By::HashSource) => BalanceBy::Hash(HashKey::Source),
        Err(_) => return Err(Refused(format!("unknown way {} of balancing", balance.by))),
    };
    let zone = match Zone::try_from(balance.zone) {
        Ok(Zone::Unset) => ZonePolicy::Unset,
        Ok(Zone::Any) => ZonePolicy::Any,
        Ok(Zone::Prefer) => ZonePolicy::Prefer,
        Ok(Zone::Only) => ZonePolicy::Only,
        Err(_) => return Err(Refused(format!("unknown zone policy {}", balance.zone))),
    };
    Ok(Balance { by, zone, warm_up: milliseconds(balance.warm_up_ms) })
}

fn decode_faults(faults: &proto::Faults) -> Result<Faults, Refused> {
    let abort = match (faults.abort_permyriad, u16::try_from(faults.abort_status)) {
        (0, _) => None,
        (permyriad, Ok(status @ 200..=599)) => Some(Abort { status, permyriad }),
        _ => return Err(Refused(format!("invalid status {} of a fault", faults.abort_status))),
    };
    let delay = milliseconds(faults.delay_ms).filter(|_| faults.delay_permyriad > 0);
    Ok(Faults {
        delay: delay.map(|by| Delay { by, permyriad: faults.delay_permyriad }),
        abort,
        until_unix: faults.until_unix,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_policy_says_is_what_is_used() {
        let traffic = proto::Traffic {
            timeout: Some(proto::Timeouts { request_ms: 2_000, idle_ms: 60_000, ..Default::default() }),
            retry: Some(proto::Retries {
                on: vec![1, 4],
                attempts: 2,
                budget_percent: 20,
                ..Default::default()
            }),
            breaker: Some(proto::Breaker {
                consecutive_failures: 5,
                eject_ms: 10_000,
                max_ejected_percent: 50,
                ..Default::default()
            }),
            balance: Some(proto::Balance {
                by: proto::balance::By::HashHeader.into(),
                hash_name: "x-user".into(),
                zone: proto::balance::Zone::Prefer.into(),
                ..Default::default()
            }),
            faults: Some(proto::Faults {
                delay_ms: 200,
                delay_permyriad: 500,
                abort_status: 503,
                abort_permyriad: 100,
                until_unix: 7,
                ..Default::default()
            }),
        };
        let decoded = decode_traffic(Some(&traffic)).unwrap();
        let timeout = decoded.timeout.unwrap();
        assert_eq!((timeout.request, timeout.attempt), (Some(Duration::from_secs(2)), None));
        let on = decoded.retry.unwrap().on;
        assert_eq!(on, RetryOn { server_error: true, unavailable: true, ..RetryOn::default() });
        assert_eq!(decoded.breaker.unwrap().consecutive_failures, Some(5));
        let balance = decoded.balance.as_ref().unwrap();
        assert_eq!(balance.by, BalanceBy::Hash(HashKey::Header("x-user".into())));
        assert_eq!((balance.zone, balance.warm_up), (ZonePolicy::Prefer, None));
        let faults = decoded.faults.unwrap();
        assert_eq!(faults.abort, Some(Abort { status: 503, permyriad: 100 }));
        assert_eq!(faults.delay, Some(Delay { by: Duration::from_millis(200), permyriad: 500 }));
        assert_eq!(*decode_traffic(None).unwrap(), Traffic::default());
        for (sent, used) in
            [(proto::balance::Zone::Any, ZonePolicy::Any), (proto::balance::Zone::Unset, ZonePolicy::Unset)]
        {
            let balance = proto::Balance { zone: sent.into(), ..Default::default() };
            assert_eq!(decode_balance(&balance).unwrap().zone, used);
        }
    }

    #[test]
    fn values_that_this_build_does_not_know_are_refused_and_not_left_out() {
        let refused = |traffic: proto::Traffic| decode_traffic(Some(&traffic)).unwrap_err().0;
        let retry = Some(proto::Retries { on: vec![99], ..Default::default() });
        assert!(refused(proto::Traffic { retry, ..Default::default() }).contains("99"));
        for balance in [
            proto::Balance { by: 99, ..Default::default() },
            proto::Balance { zone: 99, ..Default::default() },
        ] {
            let traffic = proto::Traffic { balance: Some(balance), ..Default::default() };
            assert!(refused(traffic).contains("99"));
        }
        let nameless = proto::Balance { by: proto::balance::By::HashCookie.into(), ..Default::default() };
        refused(proto::Traffic { balance: Some(nameless), ..Default::default() });
        let abort = proto::Faults { abort_status: 42, abort_permyriad: 1, ..Default::default() };
        assert!(refused(proto::Traffic { faults: Some(abort), ..Default::default() }).contains("42"));
    }
}
