//! When an endpoint is left alone: after failures in a row, or when most of what it got in ten seconds has failed. After
//! a while one request finds out whether it serves again.
//!
//! In: how attempts ended. Out: whether an endpoint is ejected. How many may be is decided by the balancer, which knows
//! them all.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::traffic;

/// Failures in a row that eject an endpoint without a policy: of those only that no application has seen.
const UNREACHED: u32 = 5;
/// How long an endpoint is ejected for the first time without a policy.
const EJECT_FOR: Duration = Duration::from_secs(10);
/// The most that an endpoint is ejected for. One that has served for so long is ejected as if for the first time.
const LONGEST: Duration = Duration::from_secs(300);
/// How much longer or shorter that may be: sidecars that ejected together do not probe together.
const JITTER: f64 = 0.25;
/// How many endpoints may be ejected at a time without a policy, in percent.
const MAX_EJECTED_PERCENT: u32 = 50;
/// Requests within the window that say something of an endpoint.
const ENOUGH: u32 = 10;
/// One for each second.
const BUCKETS: usize = 10;

/// How an attempt ended, as far as it says something of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It served.
    Good,
    /// It answered that the client is at fault. That says nothing about how often it fails, but it brings back an
    /// endpoint that was ejected.
    ClientError,
    /// Nothing: the client broke off, or the endpoint sheds load.
    Neutral,
    /// Nothing, and it has taken long to learn that: the client did not wait for the answer.
    Abandoned,
    /// It asks for less (429). That does not eject it, but it does not bring it back either.
    Throttled,
    /// It failed, and the application may have seen the request.
    Failed,
    /// It failed before the application had seen a byte.
    Unreached,
    /// The same, on a connection that another attempt was opening. That one is counted: five requests that wait for one
    /// connection are not five failures in a row.
    UnreachedWithAnother,
}

impl Verdict {
    /// The same, of an attempt that has perhaps waited for a connection that another one was opening.
    pub fn waited(self, for_another: bool) -> Self {
        match self {
            Self::Unreached if for_another => Self::UnreachedWithAnother,
            verdict => verdict,
        }
    }
}

/// What a verdict has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The endpoint gets nothing for a while.
    Ejected,
    /// It would be ejected, but too many are already.
    Capped,
    /// It serves again.
    Restored,
    /// It would be ejected by a policy that is only tried.
    WouldEject,
}

/// When an endpoint is ejected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Failures in a row that no application has seen; 0: however many.
    unreached: u32,
    /// Failures in a row of any kind; 0: however many.
    failed: u32,
    /// Whether the share of failures counts too.
    share: bool,
    eject_for: Duration,
    pub(super) max_ejected_percent: u32,
    /// The same as `failed` and `share` of a policy that is only tried: what they say is counted.
    shadow_failed: u32,
    shadow_share: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            unreached: UNREACHED,
            failed: 0,
            share: false,
            eject_for: EJECT_FOR,
            max_ejected_percent: MAX_EJECTED_PERCENT,
            shadow_failed: 0,
            shadow_share: false,
        }
    }
}

impl Rules {
    pub(super) fn of(breaker: Option<&traffic::Breaker>, shadow: Option<&traffic::Breaker>) -> Self {
        let tried = shadow.and_then(|breaker| breaker.consecutive_failures);
        let (shadow_failed, shadow_share) = (tried.unwrap_or(0), tried.is_some());
        let Some(breaker) = breaker else {
            return Self { shadow_failed, shadow_share, ..Self::default() };
        };
        Self {
            unreached: 0,
            failed: breaker.consecutive_failures.unwrap_or(0),
            share: breaker.consecutive_failures.is_some(),
            eject_for: breaker.eject_for,
            max_ejected_percent: breaker.max_ejected_percent,
            shadow_failed,
            shadow_share,
        }
    }

    /// Whether what endpoints serve has to be counted too.
    fn needs_shares(&self) -> bool {
        self.share || self.shadow_share
    }

    /// Whether nothing ejects an endpoint.
    pub(super) fn is_off(&self) -> bool {
        self.unreached == 0 && self.failed == 0 && !self.share
    }

    /// For how long an endpoint is ejected that has been so often before, `chance` from 0 to 1.
    fn time(&self, before: u32, chance: f64) -> Duration {
        let doubled = self.eject_for.saturating_mul(1 << before.min(16)).min(LONGEST);
        doubled.mul_f64(1.0 - JITTER + 2.0 * JITTER * chance)
    }
}

/// What the breaker knows of an endpoint.
#[derive(Debug, Default)]
pub(super) struct Health {
    unreached: Cell<u32>,
    failed: Cell<u32>,
    /// Only where a policy asks for shares.
    window: RefCell<Option<Box<Window>>>,
    ejection: Cell<Option<Ejection>>,
    /// How often it was ejected, one soon after the other.
    times: Cell<u32>,
    restored: Cell<Option<Instant>>,
}

/// The endpoint is ejected.
#[derive(Clone, Copy, Debug)]
struct Ejection {
    /// When a request may find out whether it serves again.
    until: Instant,
    /// When the request has gone that finds out.
    probed: Option<Instant>,
}

impl Health {
    /// Whether it is ejected, be it that a probe is due.
    pub(super) fn is_ejected(&self) -> bool {
        self.ejection.get().is_some()
    }

    /// Whether a request should find out if it serves again.
    pub(super) fn is_probe_due(&self, now: Instant) -> bool {
        self.ejection.get().is_some_and(|ejection| ejection.until <= now)
    }

    /// The next request is the probe. If nothing comes of it, another one goes after the same time.
    pub(super) fn probe(&self, rules: &Rules, now: Instant) {
        let until = now + rules.time(self.times.get(), fastrand::f64());
        self.ejection.set(Some(Ejection { until, probed: Some(now) }));
    }

    /// Whether a verdict changes nothing.
    pub(super) fn learns_nothing(&self, verdict: Verdict, rules: &Rules) -> bool {
        let is_clean = || self.unreached.get() == 0 && self.failed.get() == 0;
        !self.is_ejected()
            && match verdict {
                Verdict::Good => !rules.needs_shares() && is_clean(),
                Verdict::ClientError
                | Verdict::Neutral
                | Verdict::Abandoned
                | Verdict::Throttled
                | Verdict::UnreachedWithAnother => true,
                Verdict::Failed | Verdict::Unreached => false,
            }
    }

    /// Takes over how an attempt ended that began `since`; whether the endpoint should be ejected for it.
    pub(super) fn take(&self, verdict: Verdict, since: Instant, rules: &Rules, now: Instant) -> Taken {
        if let Some(ejection) = self.ejection.get() {
            return self.take_probe(ejection, verdict, since, rules, now);
        }
        match verdict {
            Verdict::ClientError
            | Verdict::Neutral
            | Verdict::Abandoned
            | Verdict::Throttled
            | Verdict::UnreachedWithAnother => return Taken::Nothing,
            Verdict::Good => {
                self.unreached.set(0);
                self.failed.set(0);
            }
            Verdict::Failed => {
                self.unreached.set(0);
                self.failed.set(self.failed.get().saturating_add(1));
            }
            Verdict::Unreached => {
                self.unreached.set(self.unreached.get().saturating_add(1));
                self.failed.set(self.failed.get().saturating_add(1));
            }
        }
        let fails_mostly = rules.needs_shares() && self.count(verdict == Verdict::Good, now);
        if verdict == Verdict::Good {
            return Taken::Nothing;
        }
        let reached = |run: &Cell<u32>, limit: u32| limit > 0 && run.get() >= limit;
        if (rules.share && fails_mostly)
            || reached(&self.unreached, rules.unreached)
            || reached(&self.failed, rules.failed)
        {
            return Taken::Bad;
        }
        self.take_shadow(fails_mostly, rules)
    }

    /// What a policy says that is only tried, once for each time that it would eject the endpoint.
    fn take_shadow(&self, fails_mostly: bool, rules: &Rules) -> Taken {
        let run = self.failed.get();
        if rules.shadow_failed > 0 && run == rules.shadow_failed {
            return Taken::WouldBeBad;
        }
        // A run that is longer was reported when it reached the limit. Where the share is enforced too, the window is
        // that of the policy that holds.
        if rules.shadow_share && !rules.share && fails_mostly && run < rules.shadow_failed {
            // As after an ejection.
            self.window.replace(None);
            return Taken::WouldBeBad;
        }
        Taken::Nothing
    }

    fn take_probe(
        &self,
        ejection: Ejection,
        verdict: Verdict,
        since: Instant,
        rules: &Rules,
        now: Instant,
    ) -> Taken {
        // What was sent before says what is known already.
        if ejection.probed.is_none_or(|probed| since < probed) {
            return Taken::Nothing;
        }
        match verdict {
            // An application that knows what is wrong with a request serves, also where a probe of it gets nothing else.
            Verdict::Good | Verdict::ClientError => {
                self.restore(now);
                Taken::Restored
            }
            // Nothing was found out.
            Verdict::Neutral => {
                self.ejection.set(Some(Ejection { until: now, probed: None }));
                Taken::Nothing
            }
            // The next one would wait in vain too, most likely: not before its time.
            Verdict::Abandoned => {
                self.ejection.set(Some(Ejection { probed: None, ..ejection }));
                Taken::Nothing
            }
            Verdict::Throttled | Verdict::Failed | Verdict::Unreached | Verdict::UnreachedWithAnother => {
                self.times.set(self.times.get().saturating_add(1));
                let until = now + rules.time(self.times.get(), fastrand::f64());
                self.ejection.set(Some(Ejection { until, probed: None }));
                Taken::Nothing
            }
        }
    }

    /// Counts into the window; whether this one has failed, as have most of enough requests in it.
    fn count(&self, good: bool, now: Instant) -> bool {
        let mut window = self.window.borrow_mut();
        let window = window.get_or_insert_with(|| Box::new(Window::new(now)));
        window.count(good, now);
        // A request that was served is no reason to look.
        !good && {
            let (good, failed) = window.sums();
            good + failed >= ENOUGH && good < failed
        }
    }

    /// It gets nothing for a while.
    pub(super) fn eject(&self, rules: &Rules, now: Instant) {
        let is_first = self.restored.get().is_none_or(|at| now.duration_since(at) >= LONGEST);
        let times = if is_first { 0 } else { self.times.get().saturating_add(1) };
        self.times.set(times);
        let until = now + rules.time(times, fastrand::f64());
        self.ejection.set(Some(Ejection { until, probed: None }));
    }

    /// It gets its share again.
    pub(super) fn restore(&self, now: Instant) {
        self.ejection.set(None);
        self.restored.set(Some(now));
        self.unreached.set(0);
        self.failed.set(0);
        self.window.replace(None);
    }
}

/// What a verdict means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Nothing,
    /// The endpoint should be ejected.
    Bad,
    WouldBeBad,
    Restored,
}

/// Exact counts of the last ten seconds.
#[derive(Debug)]
struct Window {
    start: Instant,
    second: u64,
    /// Good and failed, by the second.
    buckets: [(u32, u32); BUCKETS],
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { start: now, second: 0, buckets: [(0, 0); BUCKETS] }
    }

    fn count(&mut self, good: bool, now: Instant) {
        let second = now.duration_since(self.start).as_secs();
        let passed = second.saturating_sub(self.second).min(BUCKETS as u64);
        for step in 1..=passed {
            let index = ((second - passed + step) % BUCKETS as u64) as usize;
            if let Some(bucket) = self.buckets.get_mut(index) {
                *bucket = (0, 0);
            }
        }
        self.second = second.max(self.second);
        if let Some((goods, failures)) = self.buckets.get_mut((self.second % BUCKETS as u64) as usize) {
            if good { *goods += 1 } else { *failures += 1 }
        }
    }

    fn sums(&self) -> (u32, u32) {
        self.buckets.iter().fold((0, 0), |(good, failed), bucket| (good + bucket.0, failed + bucket.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(consecutive_failures: Option<u32>) -> Rules {
        let eject_for = Duration::from_secs(10);
        let breaker = traffic::Breaker { consecutive_failures, eject_for, max_ejected_percent: 50 };
        Rules::of(Some(&breaker), None)
    }

    fn take(health: &Health, rules: &Rules, verdict: Verdict, now: Instant) -> Taken {
        health.take(verdict, now, rules, now)
    }

    #[test]
    fn without_a_policy_only_what_no_application_has_seen_ejects() {
        let (health, rules, now) = (Health::default(), Rules::default(), Instant::now());
        for _ in 0..100 {
            assert_eq!(take(&health, &rules, Verdict::Failed, now), Taken::Nothing);
        }
        let run = |verdicts: &[Verdict]| -> Vec<Taken> {
            verdicts.iter().map(|verdict| take(&health, &rules, *verdict, now)).collect()
        };
        run(&[Verdict::Unreached; 4]);
        assert_eq!(run(&[Verdict::Good, Verdict::Unreached]), [Taken::Nothing; 2], "not in a row");
        assert_eq!(run(&[Verdict::Unreached; 4]).last(), Some(&Taken::Bad));
    }

    #[test]
    fn a_share_of_failures_counts_when_there_are_enough_and_only_for_ten_seconds() {
        let (rules, start) = (policy(Some(1_000)), Instant::now());
        let health = Health::default();
        let at = |tenths: u32| start + Duration::from_millis(100) * tenths;
        let mixed = |number: u32| if number % 5 < 2 { Verdict::Good } else { Verdict::Failed };
        let bad = (0..30).find(|number| take(&health, &rules, mixed(*number), at(*number)) == Taken::Bad);
        assert_eq!(bad, Some(9), "three of five fail, and the tenth is enough");
        let health = Health::default();
        let slow = (0..100).any(|number| {
            take(&health, &rules, Verdict::Failed, start + Duration::from_millis(1_200) * number)
                == Taken::Bad
        });
        assert!(!slow, "there are never ten in ten seconds");
        let health = Health::default();
        let half = |number: u32| if number.is_multiple_of(2) { Verdict::Good } else { Verdict::Failed };
        assert!((0..1000).all(|number| take(&health, &rules, half(number), at(number)) == Taken::Nothing));
    }

    #[test]
    fn clients_faults_and_429_neither_eject_nor_interrupt() {
        let (health, rules, now) = (Health::default(), policy(Some(2)), Instant::now());
        for verdict in [Verdict::Failed, Verdict::Neutral, Verdict::ClientError, Verdict::Throttled] {
            assert_eq!(take(&health, &rules, verdict, now), Taken::Nothing);
        }
        assert_eq!(take(&health, &rules, Verdict::Failed, now), Taken::Bad);
    }

    #[test]
    fn a_connection_that_several_requests_have_waited_for_fails_once() {
        let (rules, policy, now) = (Rules::default(), policy(Some(2)), Instant::now());
        for rules in [&rules, &policy] {
            let health = Health::default();
            assert_eq!(take(&health, rules, Verdict::Unreached, now), Taken::Nothing);
            for _ in 0..100 {
                assert!(health.learns_nothing(Verdict::UnreachedWithAnother, rules));
                assert_eq!(take(&health, rules, Verdict::UnreachedWithAnother, now), Taken::Nothing);
            }
        }
        // One that finds out whether the endpoint serves again has found out.
        let health = Health::default();
        health.eject(&rules, now);
        let later = now + Duration::from_secs(13);
        health.probe(&rules, later);
        take(&health, &rules, Verdict::UnreachedWithAnother, later);
        assert!(health.is_ejected() && !health.is_probe_due(later + Duration::from_secs(14)));
    }

    #[test]
    fn a_probe_that_is_answered_that_its_client_is_at_fault_brings_an_endpoint_back() {
        let (health, rules, now) = (Health::default(), policy(Some(1)), Instant::now());
        health.eject(&rules, now);
        let later = now + Duration::from_secs(13);
        health.probe(&rules, later);
        assert_eq!(take(&health, &rules, Verdict::ClientError, later), Taken::Restored);
        assert!(!health.is_ejected());
    }

    #[test]
    fn one_probe_decides_and_what_was_sent_before_does_not() {
        let (health, rules, now) = (Health::default(), policy(Some(1)), Instant::now());
        health.eject(&rules, now);
        assert!(health.is_ejected() && !health.is_probe_due(now + Duration::from_secs(7)));
        let later = now + Duration::from_secs(13);
        assert!(health.is_probe_due(later));
        assert_eq!(take(&health, &rules, Verdict::Good, later), Taken::Nothing, "nobody has probed it");
        health.probe(&rules, later);
        assert!(!health.is_probe_due(later + Duration::from_secs(1)), "one is enough");
        assert_eq!(health.take(Verdict::Good, now, &rules, later), Taken::Nothing);
        assert_eq!(take(&health, &rules, Verdict::Throttled, later), Taken::Nothing);
        assert!(health.is_ejected());
        let last = later + Duration::from_secs(30);
        health.probe(&rules, last);
        assert_eq!(take(&health, &rules, Verdict::Good, last), Taken::Restored);
        assert!(!health.is_ejected());
    }

    #[test]
    fn a_policy_of_no_failures_turns_the_breaker_off() {
        let (health, rules, now) = (Health::default(), policy(None), Instant::now());
        for verdict in [Verdict::Failed, Verdict::Unreached] {
            assert!((0..100).all(|_| take(&health, &rules, verdict, now) == Taken::Nothing), "{verdict:?}");
        }
        assert!(rules.is_off() && !policy(Some(5)).is_off() && !Rules::default().is_off());
    }

    #[test]
    fn a_probe_that_its_client_gave_up_is_not_followed_by_another_at_once() {
        let (health, rules, now) = (Health::default(), policy(Some(1)), Instant::now());
        health.eject(&rules, now);
        let later = now + Duration::from_secs(13);
        for (verdict, is_due) in [(Verdict::Neutral, true), (Verdict::Abandoned, false)] {
            health.probe(&rules, later);
            assert_eq!(take(&health, &rules, verdict, later), Taken::Nothing);
            assert_eq!(health.is_probe_due(later + Duration::from_secs(1)), is_due, "{verdict:?}");
        }
        assert!(health.is_probe_due(later + Duration::from_secs(13)), "after the same time");
    }

    #[test]
    fn the_time_doubles_up_to_five_minutes_give_or_take_a_quarter() {
        let rules = policy(Some(1));
        let seconds = |before| (rules.time(before, 0.0).as_secs_f64(), rules.time(before, 1.0).as_secs_f64());
        for (before, expected) in
            [(0, (7.5, 12.5)), (1, (15.0, 25.0)), (5, (225.0, 375.0)), (60, (225.0, 375.0))]
        {
            let (least, most) = seconds(before);
            assert!((least - expected.0).abs() < 1e-6 && (most - expected.1).abs() < 1e-6, "{before}");
        }
        let (health, now) = (Health::default(), Instant::now());
        health.eject(&rules, now);
        health.restore(now);
        health.eject(&rules, now + Duration::from_secs(1));
        assert_eq!(health.times.get(), 1);
        health.restore(now);
        health.eject(&rules, now + LONGEST);
        assert_eq!(health.times.get(), 0, "it has served for long enough");
    }

    #[test]
    fn what_is_only_tried_is_said_once_for_each_run() {
        let breaker = traffic::Breaker {
            consecutive_failures: Some(3),
            eject_for: Duration::from_secs(10),
            max_ejected_percent: 50,
        };
        let (rules, health, now) = (Rules::of(None, Some(&breaker)), Health::default(), Instant::now());
        let seen: Vec<Taken> = (0..5).map(|_| take(&health, &rules, Verdict::Failed, now)).collect();
        assert_eq!(seen.iter().filter(|taken| **taken == Taken::WouldBeBad).count(), 1);
        assert!(!health.is_ejected());
    }

    #[test]
    fn what_is_only_tried_looks_at_the_share_of_failures_too() {
        let breaker = traffic::Breaker {
            consecutive_failures: Some(5),
            eject_for: Duration::from_secs(10),
            max_ejected_percent: 50,
        };
        let (rules, now) = (Rules::of(None, Some(&breaker)), Instant::now());
        let would_be_bad = |verdict: fn(u32) -> Verdict| {
            let health = Health::default();
            let taken = (0..30).map(|number| take(&health, &rules, verdict(number), now));
            taken.filter(|taken| *taken == Taken::WouldBeBad).count()
        };
        let two_of_five = |number: u32| if number % 5 < 2 { Verdict::Good } else { Verdict::Failed };
        assert!(!Health::default().learns_nothing(Verdict::Good, &rules), "what is served counts too");
        assert_eq!(would_be_bad(two_of_five), 3, "once for each ten requests");
        assert_eq!(would_be_bad(|_| Verdict::Failed), 1, "a run that was reported is not reported again");
        assert_eq!(would_be_bad(|_| Verdict::Good), 0);
    }
}
