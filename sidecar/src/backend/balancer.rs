//! Which endpoint gets a request: first the revision by its share, then the better of two by
//! latency × load ÷ success² (power of two choices, peak EWMA). Allocates only when the endpoints change.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::tried::Tried;
use super::upstream::{Group, Upstream};
use crate::config::{Endpoint, Endpoints};

/// Endpoints among which the old one is looked for one by one when they change.
const FEW: usize = 16;
/// In a list that is longer than [`FEW`], two are drawn by chance so many times before all are counted.
const DRAWS: usize = 4;

/// The endpoints of one backend.
#[derive(Debug)]
pub(super) struct Balancer {
    group: Rc<Group>,
    points: Points,
    state: RefCell<State>,
    affinity: Cell<Option<Duration>>,
    last: RefCell<Option<Last>>,
}

/// Where this pod stands among all clients, 0 to 1, by which it gets its endpoints where clients stay with theirs. The
/// same over restarts, in all its workers, and whatever the shares are: as one grows, clients come to it and none
/// leaves.
#[derive(Debug)]
struct Points {
    among_workloads: f64,
    among_versions: f64,
}

/// What the operator has sent.
#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    split: Vec<(Arc<str>, u32)>,
}

/// An endpoint in the list.
#[derive(Debug)]
struct Slot {
    upstream: Rc<Upstream>,
    /// The share that it is of, as an index into the split; `None`: no share names it.
    share: Option<usize>,
}

/// The endpoint that this pod stays with.
#[derive(Debug)]
struct Last {
    upstream: Rc<Upstream>,
    used: Instant,
}

impl Balancer {
    /// A balancer without endpoints for a client, see [`hash`].
    pub(super) fn new(client: u64, group: &Rc<Group>) -> Self {
        let point = |of: &str| {
            let hash = hash((client, group.namespace.as_str(), group.name.as_str(), of));
            (hash >> 11) as f64 / (1u64 << 53) as f64
        };
        Self {
            points: Points { among_workloads: point("workload"), among_versions: point("version") },
            group: Rc::clone(group),
            state: RefCell::default(),
            affinity: Cell::new(None),
            last: RefCell::default(),
        }
    }

    /// How long a client stays with an endpoint after its last request; `None`: it does not.
    pub(super) fn set_affinity(&self, affinity: Option<Duration>) {
        self.affinity.set(affinity);
    }

    /// Takes a new list of endpoints over; what is known of those that stay is kept.
    pub(super) fn update(&self, new: &Endpoints) {
        let mut state = self.state.borrow_mut();
        let slots = self.slots(&state.slots, new);
        *state = State { slots, split: new.split.clone() };
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
            Slot { upstream, share }
        };
        new.endpoints.iter().map(slot).collect()
    }

    /// Chooses an endpoint that is not among `tried`.
    pub(super) fn pick(&self, tried: &Tried) -> Option<Rc<Upstream>> {
        let state = self.state.borrow();
        let usable = Candidates::usable(&state, tried);
        let affinity = self.affinity.get();
        let candidates = if state.split.is_empty() {
            usable
        } else {
            let share = match affinity {
                None => usable.choose_share(fastrand::f64(), true)?,
                Some(_) => self.share_of_client(&usable)?,
            };
            usable.of_share(share)
        };
        let kept = affinity.and_then(|affinity| self.kept(affinity, &candidates));
        let chosen = Rc::clone(kept.or_else(|| candidates.choose())?.upstream());
        if affinity.is_some() {
            self.last.replace(Some(Last { upstream: Rc::clone(&chosen), used: Instant::now() }));
        }
        Some(chosen)
    }

    /// The endpoint of the last request, where clients stay with theirs (`sessionAffinity: ClientIP`; this
    /// pod is the one client), unless it has gone or was tried.
    fn kept<'a>(&self, affinity: Duration, candidates: &Candidates<'a>) -> Option<&'a Slot> {
        let last = self.last.borrow();
        let last = last.as_ref().filter(|last| last.used.elapsed() < affinity)?;
        let address = last.upstream.endpoint.address;
        candidates.iter().find(|slot| slot.upstream.endpoint.address == address)
    }

    /// The share for a client that stays with its endpoint: it stays with its version too, so that the shares are
    /// those of clients. A Canary of one workload moves nobody to another.
    fn share_of_client(&self, usable: &Candidates<'_>) -> Option<usize> {
        let split = &usable.state.split;
        let any = || usable.choose_share(self.points.among_workloads, true);
        let unnamed = split.iter().position(|(name, _)| name.is_empty());
        let shared = split.iter().any(|(name, share)| name.is_empty() && *share > 0);
        let kept = self.affinity.get().and_then(|affinity| self.kept(affinity, usable));
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
        let usable = Candidates::usable(&state, &tried);
        if state.split.is_empty() {
            usable.iter().next().is_some()
        } else {
            usable.choose_share(0.0, true).is_some()
        }
    }

    /// Whether an endpoint, as it is known now, is about to end.
    pub(super) fn is_ending(&self, endpoint: &Endpoint) -> bool {
        let same = |known: &Endpoint| known.address == endpoint.address && known.pod_uid == endpoint.pod_uid;
        let state = self.state.borrow();
        state.slots.iter().map(|slot| &slot.upstream.endpoint).any(|known| known.terminating && same(known))
    }
}

/// A number that is the same over restarts.
pub(super) fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The share that a revision is of. One without a name is of every revision that no other names.
fn share_of(split: &[(Arc<str>, u32)], revision: &str) -> Option<usize> {
    let named = |wanted: &str| split.iter().position(|(name, _)| **name == *wanted);
    let own = if revision.is_empty() { None } else { named(revision) };
    own.or_else(|| named(""))
}

impl State {
    /// Whether an endpoint may be chosen at all: where there are shares, those of one that is not nought, and of the
    /// approved version, see [`Candidates::choose_share`].
    fn may_serve(&self, slot: &Slot) -> bool {
        let has_share = |share: usize| {
            let found = self.split.get(share);
            found.is_some_and(|(name, weight)| *weight > 0 || (share == 0 && !name.is_empty()))
        };
        self.split.is_empty() || slot.share.is_some_and(has_share)
    }
}

impl Slot {
    fn upstream(&self) -> &Rc<Upstream> {
        &self.upstream
    }
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
            self.slots.iter().map(Slot::upstream).find(|upstream| upstream.endpoint == *endpoint)
        };
        found.filter(|upstream| upstream.endpoint == *endpoint).cloned()
    }
}

/// The endpoints of a list that a request may go to, as a condition on them: nothing is collected.
#[derive(Clone, Copy)]
struct Candidates<'a> {
    state: &'a State,
    tried: &'a Tried,
    /// None that is left and may serve is ready. As kube-proxy: endpoints that terminate serve on while there is no
    /// other. A version without a share is none.
    terminating: bool,
    /// Only those of this share.
    share: Option<usize>,
}

impl<'a> Candidates<'a> {
    fn usable(state: &'a State, tried: &'a Tried) -> Self {
        let ready = Self { state, tried, terminating: false, share: None };
        if ready.iter().any(|slot| state.may_serve(slot)) {
            ready
        } else {
            Self { terminating: true, ..ready }
        }
    }

    fn of_share(self, share: usize) -> Self {
        Self { share: Some(share), ..self }
    }

    fn has(&self, slot: &Slot) -> bool {
        let endpoint = &slot.upstream.endpoint;
        (self.terminating || !endpoint.terminating)
            && (self.share.is_none() || self.share == slot.share)
            && !self.tried.contains(endpoint.address)
    }

    fn iter(self) -> impl Iterator<Item = &'a Slot> {
        self.state.slots.iter().filter(move |slot| self.has(slot))
    }

    /// A share by its weight among those that have an endpoint here: one without gets no traffic. `point`, 0 to 1, is
    /// where among all; the last named one, the version on trial, begins at 0. `others`: also one without a name.
    fn choose_share(self, point: f64, others: bool) -> Option<usize> {
        let split = &self.state.split;
        let present = |share: usize| self.of_share(share).iter().next().is_some();
        let named = split.iter().enumerate().rev().filter(|(_, (name, _))| !name.is_empty());
        let rest = split.iter().enumerate().filter(|(_, (name, _))| name.is_empty() && others);
        let entries = named.chain(rest).filter(|(index, (_, weight))| *weight > 0 && present(*index));
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
        split.first().filter(|(name, _)| !name.is_empty() && present(0)).map(|_| 0)
    }

    /// The better of two at random.
    fn choose(self) -> Option<&'a Slot> {
        let now = Instant::now();
        if let Some((a, b)) = self.draw_two(now) {
            return Some(better(a, b, now));
        }
        let (mut all, mut reachable) = (0, 0);
        for slot in self.iter() {
            all += 1;
            reachable += usize::from(!slot.upstream.is_avoided(now));
        }
        let count = if reachable > 0 { reachable } else { all };
        let mut pool = self.iter().filter(|slot| reachable == 0 || !slot.upstream.is_avoided(now));
        if count < 2 {
            return pool.next();
        }
        let first = fastrand::usize(..count);
        let second = (first + 1 + fastrand::usize(..count - 1)) % count;
        let low = pool.nth(first.min(second))?;
        let high = pool.nth(first.abs_diff(second) - 1)?;
        Some(if first < second { better(low, high, now) } else { better(high, low, now) })
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

/// The one that costs less; the first where they cost the same.
fn better<'a>(a: &'a Slot, b: &'a Slot, now: Instant) -> &'a Slot {
    if a.upstream.cost(now) <= b.upstream.cost(now) { a } else { b }
}
