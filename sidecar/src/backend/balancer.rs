//! Which endpoint gets a request: first the revision by its share, then those that are near, then the better of two by
//! latency × load ÷ success² (power of two choices, peak EWMA), or what a policy says instead. Allocates only when the
//! endpoints change.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::breaker::{Change, Rules, Taken, Verdict};
use super::candidates::{By, Candidates, FEW, Slot, State, mix};
use super::tried::Tried;
use super::upstream::{Group, Upstream, hash};
use super::zone::{ALWAYS_FAR, Most, Preference, near, spills};
use super::{Ask, Cohort};
use crate::config::traffic::{Balance, BalanceBy, HashKey, Traffic};
use crate::config::{Endpoint, Endpoints, Place};

/// How often it is looked at how busy endpoints are, near and far.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The endpoints of one backend.
#[derive(Debug)]
pub(super) struct Balancer {
    group: Rc<Group>,
    client: u64,
    points: Points,
    state: RefCell<State>,
    affinity: Cell<Option<Duration>>,
    last: RefCell<Option<Last>>,
    /// The same of requests and copies that are meant for the version on trial. The others stay where they are.
    last_on_trial: RefCell<Option<Last>>,
    balance: RefCell<Balance>,
    rules: Cell<Rules>,
    place: RefCell<Arc<Place>>,
    counts: Cell<Counts>,
    /// The next turn.
    turn: Cell<usize>,
    most: RefCell<Most>,
    busy: Cell<Option<Busy>>,
}

/// Where this pod stands among all clients, 0 to 1, by which it gets its endpoints where clients stay with theirs. The
/// same over restarts, in all its workers, and whatever the shares are: as one grows, clients come to it and none
/// leaves.
#[derive(Debug)]
struct Points {
    among_workloads: f64,
    among_versions: f64,
}

/// The endpoint that this pod stays with.
#[derive(Debug)]
struct Last {
    upstream: Rc<Upstream>,
    used: Instant,
}

/// How many endpoints are what; counted when something changes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Ejected by the breaker.
    pub(super) ejected: u32,
    /// So few are left that the ejected ones are used too.
    pub(super) is_panicking: bool,
    /// Near, ready and not ejected.
    near: usize,
}

/// Whether near endpoints are too busy, as of then.
#[derive(Clone, Copy, Debug)]
struct Busy {
    at: Instant,
    spills: bool,
}

impl Balancer {
    /// A balancer without endpoints for a client, see [`hash`].
    pub(super) fn new(client: u64, group: &Rc<Group>) -> Self {
        let point = |of: &str| fraction(hash((client, group.namespace.as_str(), group.name.as_str(), of)));
        Self {
            points: Points { among_workloads: point("workload"), among_versions: point("version") },
            group: Rc::clone(group),
            client,
            state: RefCell::default(),
            affinity: Cell::new(None),
            last: RefCell::default(),
            last_on_trial: RefCell::default(),
            balance: RefCell::default(),
            rules: Cell::default(),
            place: RefCell::new(Arc::new(Place { zone: Arc::default(), node: Arc::default() })),
            counts: Cell::default(),
            turn: Cell::new(fastrand::usize(..1 << 16)),
            most: RefCell::new(Most::new(Instant::now())),
            busy: Cell::new(None),
        }
    }

    /// How long a client stays with an endpoint after its last request; `None`: it does not.
    pub(super) fn set_affinity(&self, affinity: Option<Duration>) {
        self.affinity.set(affinity);
    }

    /// Takes over what policies say; whether the endpoints must be taken over anew.
    pub(super) fn set_traffic(&self, traffic: &Traffic, shadow: &Traffic) -> bool {
        let rules = Rules::of(traffic.breaker.as_ref(), shadow.breaker.as_ref());
        self.rules.set(rules);
        // Who turns the breaker off wants its endpoints back now.
        let releases = rules.is_off() && self.counts.get().ejected > 0;
        if releases {
            let now = Instant::now();
            self.state.borrow().slots.iter().for_each(|slot| slot.upstream.health.restore(now));
            self.recount(now);
        }
        let balance = traffic.balance.clone().unwrap_or_default();
        let changed = *self.balance.borrow() != balance;
        self.balance.replace(balance);
        changed || releases
    }

    /// Takes over where this pod runs; whether the endpoints must be taken over anew.
    pub(super) fn set_place(&self, place: &Arc<Place>) -> bool {
        !Arc::ptr_eq(&self.place.replace(Arc::clone(place)), place)
    }

    /// What requests have in common that go to the same endpoint.
    pub(super) fn hash_key(&self) -> Option<HashKey> {
        match &self.balance.borrow().by {
            BalanceBy::Hash(key) => Some(key.clone()),
            _ => None,
        }
    }

    /// Takes a new list of endpoints over; what is known of those that stay is kept.
    pub(super) fn update(&self, new: &Endpoints) {
        let now = Instant::now();
        let (warm_up, zone) = {
            let balance = self.balance.borrow();
            (balance.warm_up, balance.zone)
        };
        let (preference, is_near) = near(new, &self.place.borrow(), zone);
        let mut slots = self.slots(&self.state.borrow().slots, new);
        for (slot, is_near) in slots.iter_mut().zip(&is_near) {
            slot.near = *is_near;
        }
        let mut warm_at = None;
        if let Some(time) = warm_up {
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            for (slot, endpoint) in slots.iter_mut().zip(&new.endpoints) {
                let seen = slot.upstream.first_seen_ready(endpoint.ready_unix, now);
                slot.ready = ready(endpoint.ready_unix, unix, now).map(|ready| ready.min(seen));
                warm_at = warm_at.max(slot.ready.map(|ready| ready + time));
            }
        }
        let split = new.split.clone();
        let trial = trial(new);
        self.state.replace(State { slots, split, trial, preference, warm_up, warm_at });
        self.busy.set(None);
        self.recount(now);
    }

    fn slots(&self, old: &[Slot], new: &Endpoints) -> Vec<Slot> {
        let old = Known::of(old);
        let canary = new.canary.as_ref().map(|canary| Rc::new(canary.clone()));
        let slot = |endpoint: &Endpoint| {
            let upstream = old.find(endpoint).unwrap_or_else(|| Upstream::new(endpoint.clone(), &self.group));
            let share = share_of(&new.split, &endpoint.revision);
            // What the Canary's versions have no name for is another workload's.
            let named =
                share.and_then(|share| new.split.get(share)).is_some_and(|(name, _)| !name.is_empty());
            upstream.counts_for(canary.as_ref().filter(|_| named));
            Slot { upstream, share, near: false, ready: None }
        };
        new.endpoints.iter().map(slot).collect()
    }

    /// Chooses an endpoint.
    #[cfg(test)]
    pub(super) fn pick(&self, ask: &Ask) -> Option<Rc<Upstream>> {
        self.pick_at(ask, Instant::now())
    }

    /// Chooses an endpoint.
    pub(super) fn pick_at(&self, ask: &Ask, now: Instant) -> Option<Rc<Upstream>> {
        let state = self.state.borrow();
        let counts = self.counts.get();
        let ejected = counts.ejected == 0 || counts.is_panicking;
        let usable = Candidates::usable(&state, &ask.tried, ejected);
        let stay =
            ask.stay.and_then(|address| usable.at(address)).filter(|slot| state.may_stay(slot, ask.cohort));
        if let Some(slot) = stay {
            return Some(self.taken(slot, ask, now));
        }
        let hash = self.hash_of(ask);
        // What a policy says of a request comes before what the Service says of its client.
        let affinity = self.affinity.get().filter(|_| hash.is_none());
        let candidates =
            if state.split.is_empty() { usable } else { usable.of_share(self.share(&usable, ask.cohort)?) };
        if !ejected
            && !ask.no_probe
            && let Some(slot) = candidates.probe(now)
        {
            return Some(self.taken(slot, ask, now));
        }
        let last = if ask.cohort == Cohort::OnTrial { &self.last_on_trial } else { &self.last };
        let kept = affinity.and_then(|affinity| kept(last, affinity, &candidates));
        let chosen = match kept {
            Some(kept) => kept,
            None => self.choose(self.narrowed(candidates, hash, now), hash, now)?,
        };
        let chosen = self.taken(chosen, ask, now);
        if affinity.is_some() {
            last.replace(Some(Last { upstream: Rc::clone(&chosen), used: now }));
        }
        Some(chosen)
    }

    /// The endpoint that was chosen. An ejected one may be chosen like any other, where too few are left: what comes of
    /// that is then what a probe would have found out, or it would stay ejected for ever.
    fn taken(&self, slot: &Slot, ask: &Ask, now: Instant) -> Rc<Upstream> {
        let upstream = &slot.upstream;
        if self.counts.get().ejected > 0 && !ask.no_probe && upstream.health.is_probe_due(now) {
            upstream.health.probe(&self.rules.get(), now);
        }
        Rc::clone(upstream)
    }

    /// What a request has in common with others, where its endpoint is chosen by that.
    fn hash_of(&self, ask: &Ask) -> Option<u64> {
        match &self.balance.borrow().by {
            BalanceBy::Hash(HashKey::Source) => ask.hash.or(Some(self.client)),
            BalanceBy::Hash(HashKey::Header(_) | HashKey::Cookie(_)) => ask.hash,
            BalanceBy::Latency | BalanceBy::Requests | BalanceBy::RoundRobin => None,
        }
    }

    /// The share that a request is of.
    fn share(&self, usable: &Candidates<'_>, cohort: Cohort) -> Option<usize> {
        let by_chance = || usable.choose_share(fastrand::f64(), true);
        let split = &usable.state.split;
        let asked = match cohort {
            Cohort::ByShare if self.affinity.get().is_some() => return self.share_of_client(usable),
            Cohort::ByShare => return by_chance(),
            Cohort::OnTrial => {
                return usable.state.trial.filter(|on| usable.has_share(*on)).or_else(by_chance);
            }
            Cohort::Stable => split.first().filter(|(name, _)| !name.is_empty()).map(|_| 0),
            Cohort::Point(point) => usable.choose_share(point, false),
        };
        // A Canary of one workload moves nobody from another.
        let first = by_chance()?;
        if split.get(first).is_some_and(|(name, _)| name.is_empty()) {
            return Some(first);
        }
        asked.filter(|share| usable.has_share(*share)).or(Some(first))
    }

    fn choose<'a>(&self, from: Candidates<'a>, hash: Option<u64>, now: Instant) -> Option<&'a Slot> {
        match &self.balance.borrow().by {
            BalanceBy::Latency => from.choose(By::Latency, now),
            BalanceBy::Requests => from.choose(By::Requests, now),
            BalanceBy::RoundRobin => {
                let turn = self.turn.get();
                self.turn.set(turn.wrapping_add(1));
                from.of_turn(turn, now)
            }
            BalanceBy::Hash(_) => match hash {
                Some(hash) => from.of_hash(hash, now),
                // It has nothing in common with any other.
                None => from.choose(By::Latency, now),
            },
        }
    }

    /// Those that are near, as far as that matters now.
    fn narrowed<'a>(&self, from: Candidates<'a>, hash: Option<u64>, now: Instant) -> Candidates<'a> {
        // Those that go to the same endpoint leave the zone together, or not at all.
        let leaves = || hash.map_or_else(fastrand::f64, |hash| fraction(mix(hash))) < ALWAYS_FAR;
        match from.state.preference {
            Preference::None | Preference::Only => from,
            Preference::First => from.if_near(true),
            Preference::Prefer if leaves() => from.if_near(false),
            Preference::Prefer if self.is_spilling(from.state, now) => from,
            Preference::Prefer => from.if_near(true),
        }
    }

    /// Whether the near endpoints can no longer take everything. Looked at a few times in a second.
    fn is_spilling(&self, state: &State, now: Instant) -> bool {
        if let Some(busy) = self.busy.get()
            && now.duration_since(busy.at) < LOOK_EVERY
        {
            return busy.spills;
        }
        let mean = |near: bool| {
            let reported = state.slots.iter().filter(|slot| slot.near == near);
            let loads = reported.filter_map(|slot| slot.upstream.reported_load(now));
            let (sum, count) =
                loads.fold((0.0, 0u32), |(sum, count), load| (sum + f64::from(load), count + 1));
            (count > 0).then(|| sum / f64::from(count))
        };
        let ready = self.counts.get().near;
        let most = self.most.borrow_mut().with(ready, now);
        let spills = spills(ready, most, mean(true).zip(mean(false)));
        self.busy.set(Some(Busy { at: now, spills }));
        spills
    }

    /// The share for a client that stays with its endpoint: it stays with its version too, so that the shares are
    /// those of clients. A Canary of one workload moves nobody to another.
    fn share_of_client(&self, usable: &Candidates<'_>) -> Option<usize> {
        let split = &usable.state.split;
        let any = || usable.choose_share(self.points.among_workloads, true);
        let unnamed = split.iter().position(|(name, _)| name.is_empty());
        let shared = split.iter().any(|(name, share)| name.is_empty() && *share > 0);
        let kept = self.affinity.get().and_then(|affinity| kept(&self.last, affinity, usable));
        let elsewhere = match kept {
            Some(kept) => shared && kept.share == unnamed,
            None => Some(any()?) == unnamed,
        };
        if elsewhere {
            return unnamed;
        }
        usable.choose_share(self.points.among_versions, false).or_else(any)
    }

    /// Whether another endpoint than this one could serve.
    pub(super) fn has_other(&self, than: SocketAddr) -> bool {
        let state = self.state.borrow();
        let mut tried = Tried::default();
        tried.push(than);
        let usable = Candidates::usable(&state, &tried, true);
        if state.split.is_empty() {
            usable.iter().next().is_some()
        } else {
            usable.choose_share(0.0, true).is_some()
        }
    }

    /// Whether any endpoint has a sidecar.
    pub(super) fn is_meshed(&self) -> bool {
        self.state.borrow().slots.iter().any(|slot| slot.upstream.is_meshed())
    }

    /// Whether an endpoint, as it is known now, is about to end.
    pub(super) fn is_ending(&self, endpoint: &Endpoint) -> bool {
        let same = |known: &Endpoint| known.address == endpoint.address && known.pod_uid == endpoint.pod_uid;
        let state = self.state.borrow();
        state.slots.iter().map(|slot| &slot.upstream.endpoint).any(|known| known.terminating && same(known))
    }

    /// Takes over how an attempt at an endpoint ended now that began `since`.
    pub(super) fn observe(
        &self,
        upstream: &Upstream,
        since: Instant,
        verdict: Verdict,
        now: Instant,
    ) -> Option<Change> {
        let rules = self.rules.get();
        if upstream.health.learns_nothing(verdict, &rules) {
            return None;
        }
        match upstream.health.take(verdict, since, &rules, now) {
            Taken::Nothing => None,
            Taken::WouldBeBad => Some(Change::WouldEject),
            Taken::Restored => {
                self.recount(now);
                Some(Change::Restored)
            }
            Taken::Bad if !self.may_eject(upstream, rules.max_ejected_percent) => Some(Change::Capped),
            Taken::Bad => {
                upstream.health.eject(&rules, now);
                self.recount(now);
                Some(Change::Ejected)
            }
        }
    }

    /// Whether one more may be ejected: of each version so many percent, at least one, and never the only one. A version
    /// on trial that fails is for its judge to see.
    fn may_eject(&self, upstream: &Upstream, max_percent: u32) -> bool {
        let state = self.state.borrow();
        let is_it = |slot: &&Slot| std::ptr::eq(&*slot.upstream, upstream);
        let Some(share) = state.slots.iter().find(is_it).map(|slot| slot.share) else { return false };
        let version =
            state.slots.iter().filter(|slot| slot.share == share && !slot.upstream.endpoint.terminating);
        let (all, ejected) = version.fold((0u64, 0u64), |(all, ejected), slot| {
            (all + 1, ejected + u64::from(slot.upstream.health.is_ejected()))
        });
        all > 1 && ejected < (all * u64::from(max_percent) / 100).max(1)
    }

    /// How many endpoints are ejected, and whether so few are left that these are used too.
    pub(super) fn counts(&self) -> Counts {
        self.counts.get()
    }

    /// The endpoints that are ejected.
    pub(super) fn ejected(&self) -> Vec<SocketAddr> {
        let state = self.state.borrow();
        let upstreams = state.slots.iter().map(|slot| &slot.upstream);
        let ejected = upstreams.filter(|one| !one.endpoint.terminating && one.health.is_ejected());
        ejected.map(|one| one.endpoint.address).collect()
    }

    fn recount(&self, now: Instant) {
        let state = self.state.borrow();
        let (mut ready, mut ejected, mut near) = (0u32, 0u32, 0);
        for slot in state.slots.iter().filter(|slot| !slot.upstream.endpoint.terminating) {
            let is_ejected = slot.upstream.health.is_ejected();
            ready += 1;
            ejected += u32::from(is_ejected);
            near += usize::from(slot.near && !is_ejected);
        }
        let is_panicking = ejected > 0 && (ready - ejected) * 2 < ready;
        self.counts.set(Counts { ejected, is_panicking, near });
        if state.preference == Preference::Prefer {
            self.most.borrow_mut().with(near, now);
        }
    }
}

/// A hash as a number from 0 to 1.
fn fraction(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// The endpoint of the last request, where clients stay with theirs (`sessionAffinity: ClientIP`; this pod is the one
/// client), unless it has gone or was tried.
fn kept<'a>(
    last: &RefCell<Option<Last>>,
    affinity: Duration,
    candidates: &Candidates<'a>,
) -> Option<&'a Slot> {
    let last = last.borrow();
    let last = last.as_ref().filter(|last| last.used.elapsed() < affinity)?;
    candidates.at(last.upstream.endpoint.address)
}

/// The share that a revision is of. One without a name is of every revision that no other names.
fn share_of(split: &[(Arc<str>, u32)], revision: &str) -> Option<usize> {
    let named = |wanted: &str| split.iter().position(|(name, _)| **name == *wanted);
    let own = if revision.is_empty() { None } else { named(revision) };
    own.or_else(|| named(""))
}

/// The share of the version on trial: the one that requests are steered to, else the last one that has a name and is not
/// the approved one.
fn trial(new: &Endpoints) -> Option<usize> {
    let named = |steered: &str| new.split.iter().position(|(name, _)| **name == *steered);
    let steered = new.steering.as_ref().and_then(|steering| named(&steering.revision));
    steered.or_else(|| new.split.iter().rposition(|(name, _)| !name.is_empty()).filter(|index| *index > 0))
}

/// When an endpoint became ready that did so then, in seconds since 1970; `None`: not known, or before this process
/// could know.
fn ready(ready_unix: i64, unix: Duration, now: Instant) -> Option<Instant> {
    let at = u64::try_from(ready_unix).ok().filter(|at| *at > 0)?;
    // A clock that is ahead of ours: just now, or when that was first seen.
    now.checked_sub(unix.saturating_sub(Duration::from_secs(at)))
}

/// The endpoints of before, to find those that stay.
struct Known<'a> {
    slots: &'a [Slot],
    by_pod: HashMap<(SocketAddr, &'a str), &'a Rc<Upstream>>,
}

impl<'a> Known<'a> {
    fn of(slots: &'a [Slot]) -> Self {
        let long = if slots.len() > FEW { slots } else { &[] };
        let by_pod = long.iter().map(|slot| {
            let endpoint = &slot.upstream.endpoint;
            ((endpoint.address, &*endpoint.pod_uid), &slot.upstream)
        });
        Self { slots, by_pod: by_pod.collect() }
    }

    fn find(&self, endpoint: &Endpoint) -> Option<Rc<Upstream>> {
        let found = if self.slots.len() > FEW {
            self.by_pod.get(&(endpoint.address, &*endpoint.pod_uid)).copied()
        } else {
            self.slots
                .iter()
                .map(|slot| &slot.upstream)
                .find(|upstream| is_same(&upstream.endpoint, endpoint))
        };
        found.filter(|upstream| is_same(&upstream.endpoint, endpoint)).cloned()
    }
}

/// Whether what is known of one endpoint is known of the other. Where it runs, and for whom it is meant, is asked of the
/// list only.
fn is_same(known: &Endpoint, new: &Endpoint) -> bool {
    known.address == new.address
        && known.pod_uid == new.pod_uid
        && known.identity == new.identity
        && known.revision == new.revision
        && known.terminating == new.terminating
}
