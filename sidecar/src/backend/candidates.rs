//! The endpoints of a list that a request may go to, and which of them it gets.
//!
//! In: the list, and conditions on it. Out: one endpoint. Nothing is collected: conditions are asked of the list again
//! and again, which for the few endpoints of most Services is cheaper than a list of its own for each request.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Cohort;
use super::tried::Tried;
use super::upstream::Upstream;
use super::zone::Preference;

/// Endpoints among which the old one is looked for one by one when they change, and two of which are drawn by a look at
/// all of them.
pub(super) const FEW: usize = 16;
/// So many are all looked at. Of three, the best of the two that are known would always come before one that is new and
/// counts as the median.
const ALL: usize = 2;
/// In a list that is longer than [`FEW`], two are drawn by chance so many times before all are counted.
const DRAWS: usize = 4;
/// The share that an endpoint gets when it has just become ready.
const COLD: f64 = 0.1;
/// How much more than the mean an endpoint may have in flight before requests that would go there by their hash go
/// elsewhere.
const BOUND: f64 = 1.25;
/// What an endpoint may always have in flight: of less, no mean means anything.
const LEAST_BOUND: u32 = 4;

/// What the operator has sent, and what follows from it.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) slots: Vec<Slot>,
    pub(super) split: Vec<(Arc<str>, u32)>,
    /// The share of the version on trial, as an index into the split.
    pub(super) trial: Option<usize>,
    pub(super) preference: Preference,
    /// How long an endpoint that has become ready gets less than its share.
    pub(super) warm_up: Option<Duration>,
    /// When the last of them has warmed up.
    pub(super) warm_at: Option<Instant>,
}

/// An endpoint in the list.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) upstream: Rc<Upstream>,
    /// The share that it is of, as an index into the split; `None`: no share names it.
    pub(super) share: Option<usize>,
    pub(super) near: bool,
    /// When it became ready, where that matters.
    pub(super) ready: Option<Instant>,
}

impl State {
    /// Whether an endpoint may be chosen at all: where there are shares, those of one that is not nought, and of the
    /// approved version, see [`Candidates::choose_share`].
    pub(super) fn may_serve(&self, slot: &Slot) -> bool {
        let has_share = |share: usize| {
            let found = self.split.get(share);
            found.is_some_and(|(name, weight)| *weight > 0 || (share == 0 && !name.is_empty()))
        };
        self.split.is_empty() || slot.share.is_some_and(has_share)
    }

    /// Whether a session may go on at an endpoint: not with a version that gets nothing any more. Who is meant for the
    /// version on trial goes on there only.
    pub(super) fn may_stay(&self, slot: &Slot, cohort: Cohort) -> bool {
        match slot.share.and_then(|share| self.split.get(share)) {
            None => self.split.is_empty(),
            Some((name, _)) if cohort == Cohort::OnTrial && !name.is_empty() => slot.share == self.trial,
            Some((_, weight)) => *weight > 0,
        }
    }

    /// The warm-up that counts now; `None`: there is none, or so many are new that nobody else is there to take their
    /// share.
    fn warming(&self, now: Instant) -> Option<Warming> {
        let time = self.warm_up.filter(|_| self.warm_at.is_some_and(|at| at > now))?;
        let warming = Warming { time, now };
        let cold = self.slots.iter().filter(|slot| warming.share(slot) < 1.0).count();
        (cold * 2 <= self.slots.len()).then_some(warming)
    }
}

/// Endpoints that have become ready get their share bit by bit.
#[derive(Clone, Copy)]
struct Warming {
    time: Duration,
    now: Instant,
}

impl Warming {
    /// How much of its share an endpoint gets.
    fn share(&self, slot: &Slot) -> f64 {
        let Some(ready) = slot.ready else { return 1.0 };
        let part = self.now.saturating_duration_since(ready).as_secs_f64() / self.time.as_secs_f64();
        part.clamp(COLD, 1.0)
    }

    fn admits(&self, slot: &Slot) -> bool {
        let share = self.share(slot);
        share >= 1.0 || fastrand::f64() < share
    }
}

/// By what the better of several endpoints is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Latency,
    Requests,
}

impl By {
    fn cost(self, slot: &Slot, now: Instant) -> f64 {
        match self {
            Self::Latency => slot.upstream.cost(now),
            Self::Requests => f64::from(slot.upstream.pending()),
        }
    }
}

/// The endpoints of a list that a request may go to, as a condition on them.
#[derive(Clone, Copy)]
pub(super) struct Candidates<'a> {
    pub(super) state: &'a State,
    tried: &'a Tried,
    /// None that is left and may serve is ready. As kube-proxy: endpoints that terminate serve on while there is no
    /// other. A version without a share is none.
    terminating: bool,
    /// Those that the breaker has ejected too.
    ejected: bool,
    /// Only those of this share.
    share: Option<usize>,
    /// Only those that are near, or are not.
    near: Option<bool>,
}

impl<'a> Candidates<'a> {
    /// Those that may be used, the best kind of which there is one: ready, ejected, about to end. `ejected`: that makes
    /// no difference now.
    pub(super) fn usable(state: &'a State, tried: &'a Tried, ejected: bool) -> Self {
        let near = (state.preference == Preference::Only).then_some(true);
        let ready = Self { state, tried, terminating: false, ejected, share: None, near };
        let has_one = |all: &Self| all.iter().any(|slot| state.may_serve(slot));
        if has_one(&ready) {
            return ready;
        }
        let ejected = Self { ejected: true, ..ready };
        if has_one(&ejected) { ejected } else { Self { terminating: true, ..ejected } }
    }

    pub(super) fn of_share(self, share: usize) -> Self {
        Self { share: Some(share), ..self }
    }

    /// Those that are near, or are not, if there is one.
    pub(super) fn if_near(self, near: bool) -> Self {
        let narrow = Self { near: Some(near), ..self };
        if self.near.is_none() && narrow.iter().next().is_some() { narrow } else { self }
    }

    fn has(&self, slot: &Slot) -> bool {
        let endpoint = &slot.upstream.endpoint;
        (self.terminating || !endpoint.terminating)
            && (self.share.is_none() || self.share == slot.share)
            && self.near.is_none_or(|near| near == slot.near)
            && (self.ejected || !slot.upstream.health.is_ejected())
            && !self.tried.contains(endpoint.address)
    }

    pub(super) fn iter(self) -> impl Iterator<Item = &'a Slot> {
        self.state.slots.iter().filter(move |slot| self.has(slot))
    }

    /// The one at an address.
    pub(super) fn at(self, address: SocketAddr) -> Option<&'a Slot> {
        self.iter().find(|slot| slot.upstream.endpoint.address == address)
    }

    /// An ejected one of which it should be found out whether it serves again.
    pub(super) fn probe(self, now: Instant) -> Option<&'a Slot> {
        Self { ejected: true, ..self }.iter().find(|slot| slot.upstream.health.is_probe_due(now))
    }

    /// A share by its weight among those that have an endpoint here: one without gets no traffic. `point`, 0 to 1, is
    /// where among all; the last named one, the version on trial, begins at 0. `others`: also one without a name.
    pub(super) fn choose_share(self, point: f64, others: bool) -> Option<usize> {
        let split = &self.state.split;
        let named = split.iter().enumerate().rev().filter(|(_, (name, _))| !name.is_empty());
        let rest = split.iter().enumerate().filter(|(_, (name, _))| name.is_empty() && others);
        let entries = named.chain(rest).filter(|(index, (_, weight))| *weight > 0 && self.has_share(*index));
        let total: u32 = entries.clone().map(|(_, (_, weight))| weight).sum();
        let mut left = point * f64::from(total);
        for (index, (_, weight)) in entries {
            let weight = f64::from(*weight);
            if left < weight {
                return Some(index);
            }
            left -= weight;
        }
        // Every endpoint that has a share was tried or has gone. The first entry is the approved version, which serves
        // rather than nobody.
        split.first().filter(|(name, _)| !name.is_empty() && self.has_share(0)).map(|_| 0)
    }

    /// Whether a share has an endpoint here, whatever its weight.
    pub(super) fn has_share(self, share: usize) -> bool {
        self.of_share(share).iter().next().is_some()
    }

    /// The better of two at random, or the best of three where there are no more.
    pub(super) fn choose(self, by: By, now: Instant) -> Option<&'a Slot> {
        let warming = self.state.warming(now);
        if let Some((a, b)) = self.draw_two(now) {
            return Some(better(a, b, by, now, warming));
        }
        let (count, reachable) = self.count(now);
        let mut pool = self.pool(reachable, now);
        if count < 2 {
            return pool.next();
        }
        if count <= ALL {
            return best(pool, fastrand::usize(..count), by, now, warming);
        }
        let first = fastrand::usize(..count);
        let second = (first + 1 + fastrand::usize(..count - 1)) % count;
        let low = pool.nth(first.min(second))?;
        let high = pool.nth(first.abs_diff(second) - 1)?;
        let (a, b) = if first < second { (low, high) } else { (high, low) };
        Some(better(a, b, by, now, warming))
    }

    /// The one whose turn it is.
    pub(super) fn of_turn(self, turn: usize, now: Instant) -> Option<&'a Slot> {
        let (count, reachable) = self.count(now);
        let turn = turn.checked_rem(count)?;
        let warming = self.state.warming(now);
        let next = self.pool(reachable, now).nth(turn)?;
        if warming.is_none_or(|warming| warming.admits(next)) {
            return Some(next);
        }
        self.pool(reachable, now).nth((turn + 1) % count)
    }

    /// The one to which requests with this hash go (rendezvous hashing: when an endpoint comes or goes, only those
    /// move that come to it or leave it). One that has much more in flight than the mean is left out, and so is the
    /// second; then the one with the least serves.
    pub(super) fn of_hash(self, hash: u64, now: Instant) -> Option<&'a Slot> {
        let (count, reachable) = self.count(now);
        let (mut total, mut least) = (0u32, None::<(u32, &Slot)>);
        let (mut first, mut second) = (None::<(u64, u32, &Slot)>, None);
        for slot in self.pool(reachable, now) {
            let load = slot.upstream.load(now);
            total = total.saturating_add(load);
            if least.is_none_or(|(of_least, _)| load < of_least) {
                least = Some((load, slot));
            }
            let score = mix(hash ^ slot.upstream.hash);
            let here = Some((score, load, slot));
            if first.is_none_or(|(best, ..)| score > best) {
                second = first;
                first = here;
            } else if second.is_none_or(|(best, ..): (u64, u32, &Slot)| score > best) {
                second = here;
            }
        }
        let mean = f64::from(total.saturating_add(1)) / count.max(1) as f64;
        let bound = (BOUND * mean).ceil().max(f64::from(LEAST_BOUND));
        let fits = |(_, load, _): &(u64, u32, &Slot)| f64::from(*load) < bound;
        let chosen = first.filter(fits).or_else(|| second.filter(fits)).map(|(_, _, slot)| slot);
        chosen.or(least.map(|(_, slot)| slot))
    }

    /// How many there are to choose from, and whether they can be reached as far as is known.
    fn count(self, now: Instant) -> (usize, bool) {
        let (mut all, mut reachable) = (0, 0);
        for slot in self.iter() {
            all += 1;
            reachable += usize::from(!slot.upstream.is_avoided(now));
        }
        if reachable > 0 { (reachable, true) } else { (all, false) }
    }

    fn pool(self, reachable: bool, now: Instant) -> impl Iterator<Item = &'a Slot> {
        self.iter().filter(move |slot| !reachable || !slot.upstream.is_avoided(now))
    }

    /// Two different ones that can be reached, from a long list without a look at all of it, unless chance is against
    /// it.
    fn draw_two(self, now: Instant) -> Option<(&'a Slot, &'a Slot)> {
        let slots = &self.state.slots;
        if slots.len() <= FEW {
            return None;
        }
        let mut draws = (0..DRAWS).filter_map(|_| {
            let slot = slots.get(fastrand::usize(..slots.len()))?;
            (self.has(slot) && !slot.upstream.is_avoided(now)).then_some(slot)
        });
        let first = draws.next()?;
        let second = draws.find(|slot| !Rc::ptr_eq(&slot.upstream, &first.upstream))?;
        Some((first, second))
    }
}

/// The one that costs less; the first where they cost the same. One that warms up may have to leave it to the other.
fn better<'a>(a: &'a Slot, b: &'a Slot, by: By, now: Instant, warming: Option<Warming>) -> &'a Slot {
    if let Some(warming) = warming {
        match (warming.admits(a), warming.admits(b)) {
            (true, false) => return a,
            (false, true) => return b,
            _ => {}
        }
    }
    if by.cost(a, now) <= by.cost(b, now) { a } else { b }
}

/// The one of few that costs least; where they cost the same, the one that comes first from `start` on.
fn best<'a>(
    pool: impl Iterator<Item = &'a Slot>,
    start: usize,
    by: By,
    now: Instant,
    warming: Option<Warming>,
) -> Option<&'a Slot> {
    let mut found: Option<(bool, f64, bool, &Slot)> = None;
    for (index, slot) in pool.enumerate() {
        let admitted = warming.is_none_or(|warming| warming.admits(slot));
        let (cost, late) = (by.cost(slot, now), index < start);
        // In this order: whoever is admitted, whoever costs less, whoever comes from the start on.
        let is_better = found.is_none_or(|(was_admitted, least, was_late, _)| {
            (admitted && !was_admitted)
                || (admitted == was_admitted && (cost < least || (cost <= least && was_late && !late)))
        });
        if is_better {
            found = Some((admitted, cost, late, slot));
        }
    }
    found.map(|(.., slot)| slot)
}

/// Spreads a number over all numbers (the finaliser of SplitMix64).
pub(super) fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
