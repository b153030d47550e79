//! The values of a MeshPolicy's sections as numbers, and what is wrong with one that is not in force.
//!
//! The webhook rejects what is invalid here, and the operator never sends it: an object may have been written while
//! there was no webhook. Most of it the schema rejects too.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::{
    AccessLog, BalanceBy, BalanceSpec, BreakerSpec, FaultsSpec, LimitsSpec, MeshPolicySpec, RetrySpec,
    TelemetrySpec, TimeoutSpec, parse_duration, parse_percent,
};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const FIVE_MINUTES: Duration = Duration::from_secs(300);
const MOMENT: Duration = Duration::from_millis(1);
/// The most attempts beside the first. Sidecars make no more, whatever they are sent.
const MOST_RETRIES: u32 = 2;
/// How many of 10,000 requests are logged where a policy does not say.
const SAMPLE_PERMYRIAD: u32 = 100;

/// A value that is not in force: which one, why, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("spec.{field}: {reason}")]
pub struct InvalidValue {
    /// The field, such as `timeout.request`.
    pub field: &'static str,
    /// Why, and what to write.
    pub reason: String,
}

/// Timeouts in milliseconds. 0: none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeoutValues {
    /// Of a request, over all attempts.
    pub request_ms: u32,
    /// Of one attempt.
    pub attempt_ms: u32,
    /// Without a byte.
    pub idle_ms: u32,
}

/// A breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerValues {
    /// The first ejection, in milliseconds.
    pub eject_ms: u32,
    /// The largest part that is ejected, in percent.
    pub max_ejected_percent: u32,
}

/// Faults. The shares are of 10,000 requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultValues {
    /// How much later requests are sent, in milliseconds.
    pub delay_ms: u32,
    /// How many.
    pub delay_permyriad: u32,
    /// The status of requests that are aborted.
    pub abort_status: u32,
    /// How many.
    pub abort_permyriad: u32,
    /// When both end, in seconds since 1970.
    pub until_unix: i64,
}

impl LimitsSpec {
    /// Checks the section.
    ///
    /// # Errors
    /// [`InvalidValue`].
    pub fn check(&self) -> Result<(), InvalidValue> {
        let limits = [("limits.concurrency", self.concurrency), ("limits.connections", self.connections)];
        match limits.into_iter().find(|(_, limit)| *limit == Some(0)) {
            Some((field, _)) => Err(invalid(field, "0 lets nothing through: write 1 or more")),
            None => Ok(()),
        }
    }
}

impl TimeoutSpec {
    /// The section as numbers.
    ///
    /// # Errors
    /// [`InvalidValue`].
    pub fn values(&self) -> Result<TimeoutValues, InvalidValue> {
        let up_to_a_day = |field, text: &Option<String>| {
            text.as_ref().map_or(Ok(0), |text| millis(field, text, Duration::ZERO..=DAY))
        };
        let request_ms = up_to_a_day("timeout.request", &self.request)?;
        let attempt_ms = up_to_a_day("timeout.attempt", &self.attempt)?;
        if request_ms > 0 && attempt_ms > request_ms {
            let reason = format!(
                "{} is longer than the request may take with all its attempts: write at most {}, or a longer timeout.request",
                self.attempt.as_deref().unwrap_or_default(),
                self.request.as_deref().unwrap_or_default(),
            );
            return Err(invalid("timeout.attempt", reason));
        }
        Ok(TimeoutValues { request_ms, attempt_ms, idle_ms: up_to_a_day("timeout.idle", &self.idle)? })
    }
}

impl RetrySpec {
    /// The budget in percent of first attempts.
    ///
    /// # Errors
    /// [`InvalidValue`].
    pub fn budget_percent(&self) -> Result<u32, InvalidValue> {
        if self.attempts > MOST_RETRIES {
            let reason = format!(
                "{} attempts beside the first only add to an overload: write {MOST_RETRIES} or less",
                self.attempts
            );
            return Err(invalid("retry.attempts", reason));
        }
        if self.reasons().next().is_none() {
            let reason = "it must name which failures are repeated: write for example on: [5xx, reset]";
            return Err(invalid("retry.on", reason));
        }
        whole_percent("retry.budget", &self.budget)
    }
}

impl BreakerSpec {
    /// The section as numbers.
    ///
    /// # Errors
    /// [`InvalidValue`].
    pub fn values(&self) -> Result<BreakerValues, InvalidValue> {
        Ok(BreakerValues {
            eject_ms: millis("breaker.ejectFor", &self.eject_for, MOMENT..=FIVE_MINUTES)?,
            max_ejected_percent: whole_percent("breaker.maxEjected", &self.max_ejected)?,
        })
    }
}

impl BalanceSpec {
    /// The warm-up in milliseconds; 0: none.
    ///
    /// # Errors
    /// [`InvalidValue`], also where the hash does not say what by.
    pub fn warm_up_ms(&self) -> Result<u32, InvalidValue> {
        let given = self.hash.as_ref().map(|hash| {
            let given = [hash.header.is_some(), hash.cookie.is_some(), hash.source_ip == Some(true)];
            given.into_iter().filter(|given| *given).count()
        });
        match (self.by, given) {
            (BalanceBy::Hash, Some(1))
            | (BalanceBy::Latency | BalanceBy::Requests | BalanceBy::RoundRobin, None) => {}
            (BalanceBy::Hash, _) => {
                let reason = "by: Hash needs exactly one of header, cookie and sourceIp; write for example {header: x-user}";
                return Err(invalid("balance.hash", reason));
            }
            (_, Some(_)) => {
                return Err(invalid(
                    "balance.hash",
                    "only by: Hash uses it: write by: Hash, or leave hash out",
                ));
            }
        }
        self.warm_up.as_ref().map_or(Ok(0), |text| millis("balance.warmUp", text, Duration::ZERO..=HOUR))
    }
}

impl FaultsSpec {
    /// The section as numbers.
    ///
    /// # Errors
    /// [`InvalidValue`].
    pub fn values(&self) -> Result<FaultValues, InvalidValue> {
        let mut values = FaultValues { until_unix: self.until.0.as_second(), ..FaultValues::default() };
        if let Some(delay) = &self.delay {
            values.delay_ms = millis("faults.delay.by", &delay.by, MOMENT..=FIVE_MINUTES)?;
            values.delay_permyriad = permyriad("faults.delay.of", &delay.of)?;
        }
        if let Some(abort) = &self.abort {
            if !(400..600).contains(&abort.status) {
                let reason = format!("{} is not an error: write a status from 400 to 599", abort.status);
                return Err(invalid("faults.abort.status", reason));
            }
            values.abort_status = u32::from(abort.status);
            values.abort_permyriad = permyriad("faults.abort.of", &abort.of)?;
        }
        Ok(values)
    }
}

impl TelemetrySpec {
    /// How many of 10,000 requests that are not errors are logged; 0 unless a share of them is.
    ///
    /// # Errors
    /// [`InvalidValue`], also where nothing uses the share.
    pub fn sample_permyriad(&self) -> Result<u32, InvalidValue> {
        match (self.access_log, &self.sample) {
            (AccessLog::Sampled, Some(text)) => permyriad("telemetry.sample", text),
            (AccessLog::Sampled, None) => Ok(SAMPLE_PERMYRIAD),
            (_, None) => Ok(0),
            (_, Some(_)) => Err(invalid(
                "telemetry.sample",
                "only accessLog: Sampled uses it: write accessLog: Sampled, or leave sample out",
            )),
        }
    }
}

impl MeshPolicySpec {
    /// What is wrong with the sections limits, timeout, retry, breaker, balance, faults and telemetry: the first of each.
    pub fn invalid_values(&self) -> Vec<InvalidValue> {
        let found = [
            self.limits.as_ref().and_then(|limits| limits.check().err()),
            self.timeout.as_ref().and_then(|timeout| timeout.values().err()),
            self.retry.as_ref().and_then(|retry| retry.budget_percent().err()),
            self.breaker.as_ref().and_then(|breaker| breaker.values().err()),
            self.balance.as_ref().and_then(|balance| balance.warm_up_ms().err()),
            self.faults.as_ref().and_then(|faults| faults.values().err()),
            self.telemetry.as_ref().and_then(|telemetry| telemetry.sample_permyriad().err()),
        ];
        found.into_iter().flatten().collect()
    }
}

fn invalid(field: &'static str, reason: impl Into<String>) -> InvalidValue {
    InvalidValue { field, reason: reason.into() }
}

fn because(field: &'static str, error: impl Display) -> InvalidValue {
    invalid(field, error.to_string())
}

fn millis(field: &'static str, text: &str, range: RangeInclusive<Duration>) -> Result<u32, InvalidValue> {
    let span = parse_duration(text).map_err(|error| because(field, error))?;
    let out_of_range = || {
        let minutes = range.end().as_secs() / 60;
        let most =
            if minutes.is_multiple_of(60) { format!("{}h", minutes / 60) } else { format!("{minutes}m") };
        let least = if range.start().is_zero() { "" } else { "more than 0s and " };
        invalid(field, format!("{text} is out of range: write {least}at most {most}, for example 2s"))
    };
    if !range.contains(&span) {
        return Err(out_of_range());
    }
    u32::try_from(span.as_millis()).map_err(|_| out_of_range())
}

fn whole_percent(field: &'static str, text: &str) -> Result<u32, InvalidValue> {
    let hundredths = permyriad(field, text)?;
    if !hundredths.is_multiple_of(100) {
        return Err(invalid(field, format!("{text} is not a whole percentage: write for example 20%")));
    }
    Ok(hundredths / 100)
}

/// A percentage in hundredths of a percent.
fn permyriad(field: &'static str, text: &str) -> Result<u32, InvalidValue> {
    let exact = parse_percent(text).map_err(|error| because(field, error))? * 10_000.0;
    let rounded = exact.round();
    if (exact - rounded).abs() > 1e-6 {
        return Err(invalid(field, format!("{text} has more than two decimals: write for example 0.25%")));
    }
    // From 0 to 10,000.
    Ok(rounded as u32)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(section: &str, value: Value) -> MeshPolicySpec {
        serde_json::from_value(json!({"target": {"kind": "Service", "name": "web"}, section: value})).unwrap()
    }

    fn faults(delay: &str, of: &str) -> Value {
        json!({"delay": {"by": delay, "of": of}, "until": "2026-12-01T12:00:00Z"})
    }

    #[test]
    fn valid_sections_are_numbers() {
        let timeout = spec("timeout", json!({"request": "2s", "attempt": "500ms"})).timeout.unwrap();
        let values = TimeoutValues { request_ms: 2000, attempt_ms: 500, idle_ms: 0 };
        assert_eq!(timeout.values(), Ok(values));
        let unlimited = spec("timeout", json!({"request": "0s", "attempt": "5s"}));
        assert!(unlimited.invalid_values().is_empty(), "0s is no limit");
        assert_eq!(spec("retry", json!({"on": ["5xx"]})).retry.unwrap().budget_percent(), Ok(20));
        let breaker = spec("breaker", json!({})).breaker.unwrap().values();
        assert_eq!(breaker, Ok(BreakerValues { eject_ms: 10_000, max_ejected_percent: 50 }));
        let balance = json!({"by": "Hash", "hash": {"sourceIp": true}, "warmUp": "1m"});
        assert_eq!(spec("balance", balance).balance.unwrap().warm_up_ms(), Ok(60_000));
        let values = spec("faults", faults("200ms", "0.29%")).faults.unwrap().values().unwrap();
        assert_eq!((values.delay_ms, values.delay_permyriad, values.abort_status), (200, 29, 0));
        assert_eq!(values.until_unix, 1_796_126_400);
        for (telemetry, expected) in [
            (json!({"accessLog": "Sampled", "sample": "0.25%"}), 25),
            (json!({"accessLog": "Sampled"}), 100),
            (json!({"accessLog": "All"}), 0),
        ] {
            let telemetry = spec("telemetry", telemetry).telemetry.unwrap();
            assert_eq!(telemetry.sample_permyriad(), Ok(expected));
        }
    }

    #[test]
    fn an_invalid_value_is_named_with_what_to_write() {
        for (section, value, expected) in [
            ("limits", json!({"concurrency": 0}), "spec.limits.concurrency: 0 lets nothing through: write 1"),
            (
                "timeout",
                json!({"request": "2d"}),
                "spec.timeout.request: 2d is out of range: write at most 24h",
            ),
            ("timeout", json!({"idle": "2 s"}), "spec.timeout.idle: invalid duration"),
            ("timeout", json!({"request": "1s", "attempt": "3s"}), "spec.timeout.attempt: 3s is longer"),
            ("retry", json!({"attempts": 1}), "spec.retry.on: it must name"),
            ("retry", json!({"on": ["5xx"], "attempts": 3}), "spec.retry.attempts: 3 attempts"),
            ("retry", json!({"on": ["5xx"], "budget": "0.5%"}), "spec.retry.budget: 0.5% is not a whole"),
            (
                "breaker",
                json!({"ejectFor": "0s"}),
                "spec.breaker.ejectFor: 0s is out of range: write more than 0s",
            ),
            ("breaker", json!({"maxEjected": "150%"}), "spec.breaker.maxEjected: invalid percentage"),
            ("balance", json!({"by": "Hash"}), "spec.balance.hash: by: Hash needs exactly one"),
            ("balance", json!({"by": "Hash", "hash": {}}), "spec.balance.hash: by: Hash needs exactly one"),
            ("balance", json!({"hash": {"header": "x"}}), "spec.balance.hash: only by: Hash"),
            ("balance", json!({"warmUp": "2h"}), "spec.balance.warmUp: 2h is out of range"),
            ("faults", faults("6m", "1%"), "spec.faults.delay.by: 6m is out of range"),
            ("faults", faults("1s", "0.001%"), "spec.faults.delay.of: 0.001% has more than two decimals"),
            (
                "faults",
                json!({"abort": {"status": 200, "of": "1%"}, "until": "2026-12-01T12:00:00Z"}),
                "spec.faults.abort.status: 200 is not an error",
            ),
            (
                "telemetry",
                json!({"accessLog": "Errors", "sample": "5%"}),
                "spec.telemetry.sample: only accessLog: Sampled",
            ),
            (
                "telemetry",
                json!({"accessLog": "Sampled", "sample": "0.001%"}),
                "spec.telemetry.sample: 0.001% has more than two decimals",
            ),
        ] {
            let found = spec(section, value).invalid_values();
            let [error] = found.as_slice() else { panic!("{section}: {found:?}") };
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }
}
