//! The series that a sidecar's process has named. A key is named once, and from then on it is a number.

use std::sync::Arc;

use tulle_mesh::proto::{RuleKey, SeriesKey, series_key};

use super::LONG;
use super::counts::OTHER;
use super::history::{Direction, Interner, Reporter, SeriesId};

/// Keys of a process that are told apart. A sidecar itself stops at 2,000 series and 100 rules.
pub(super) const MAX_KEYS: usize = 2_200;
/// Bytes of a namespace, and of a Service's or an account's name.
const MAX_NAME: usize = 253;
/// Bytes of a route: its kind, and two names.
const MAX_ROUTE: usize = 600;
/// Bytes of a revision, as of any label value of Kubernetes.
const MAX_REVISION: usize = 63;

/// What is known of a sidecar's process.
#[derive(Debug)]
pub(super) struct Process {
    process: u64,
    /// Sequence number of its last report that was counted; 0: none.
    pub(super) last: u64,
    /// The term of leadership in which that was.
    pub(super) term: Option<i32>,
    /// When counts of a long time were spread over it last.
    spread: i64,
    reporter: Reporter,
    /// By number, ascending: a table would take twice as much memory, ten thousand times.
    keys: Vec<Key>,
}

/// A key that was named.
#[derive(Debug)]
struct Key {
    number: u32,
    /// `None`: of a direction that this build does not know. Its counts are dropped.
    series: Option<Arc<SeriesId>>,
}

/// The process of a sidecar with this number, which becomes the last one. Of too many the first is forgotten.
pub(super) fn process(processes: &mut Vec<Process>, process: u64, most: usize) -> Option<&mut Process> {
    match processes.iter().position(|known| known.process == process) {
        Some(known) => {
            let known = processes.remove(known);
            processes.push(known);
        }
        None => {
            if processes.len() >= most {
                processes.remove(0);
            }
            // Most pods have one for ever; four are what a vector makes room for.
            processes.reserve_exact(1);
            processes.push(Process::new(process));
        }
    }
    processes.last_mut()
}

impl Process {
    fn new(process: u64) -> Self {
        Self {
            process,
            last: 0,
            term: None,
            spread: i64::MIN,
            reporter: Reporter::unknown(),
            keys: Vec::new(),
        }
    }

    /// The seconds in which the counts of a report were made that says so of itself. Long times of one process do not
    /// overlap: who claims one with each report would rewrite minutes of the history with each.
    pub(super) fn seconds(&mut self, interval: i64, now: i64) -> i64 {
        let seconds = interval.min(now.saturating_sub(self.spread)).max(0);
        if seconds > LONG {
            self.spread = now;
        }
        seconds
    }

    /// Whose series they are. The model may learn of a pod after its sidecar has reported; a pod that is gone stays
    /// what it was.
    pub(super) fn report_as(&mut self, reporter: Option<Reporter>, interner: &mut Interner) {
        let Some(reporter) = reporter.filter(|reporter| *reporter != self.reporter) else { return };
        self.reporter = Reporter {
            namespace: interner.name(&reporter.namespace),
            kind: interner.name(&reporter.kind),
            workload: interner.name(&reporter.workload),
        };
        for id in self.keys.iter_mut().filter_map(|key| key.series.as_mut()) {
            *id = interner.id(SeriesId { reporter: self.reporter.clone(), ..SeriesId::clone(id) });
        }
    }

    /// Takes keys that a report introduces. What a key means does not change: one that is known is skipped.
    ///
    /// A sidecar uses no number twice, so a process that lives for long names more keys than there is room for. All are
    /// forgotten then: the report comes again with its keys, and the others with the next counts of their series.
    pub(super) fn learn(&mut self, keys: &[SeriesKey], rules: &[RuleKey], interner: &mut Interner) {
        let numbers = keys.iter().map(|key| key.id).chain(rules.iter().map(|rule| rule.id));
        let new = numbers.filter(|number| self.place(*number).is_err()).count();
        if new > 0 && self.keys.len() + new >= MAX_KEYS {
            self.keys.clear();
        }
        self.keys.reserve_exact(new.min(MAX_KEYS.saturating_sub(self.keys.len())));
        self.learn_rules(rules, interner);
        for key in keys {
            let Err(place) = self.place(key.id) else { continue };
            if self.keys.len() >= MAX_KEYS {
                continue;
            }
            let direction = match key.direction() {
                series_key::Direction::Outbound => Some(Direction::Outbound),
                series_key::Direction::Inbound => Some(Direction::Inbound),
                series_key::Direction::Unspecified | series_key::Direction::Policy => None,
            };
            let id = direction.map(|direction| {
                let id = SeriesId {
                    reporter: self.reporter.clone(),
                    direction,
                    namespace: interner.name(cut(&key.namespace, MAX_NAME)),
                    peer: interner.name(cut(&key.peer, MAX_NAME)),
                    revision: interner.name(cut(&key.revision, MAX_REVISION)),
                    route: interner.name(cut(&key.route, MAX_ROUTE)),
                    protocol: interner.name(protocol(&key.protocol)),
                    mtls: key.mtls,
                };
                interner.id(id)
            });
            self.keys.insert(place, Key { number: key.id, series: id });
        }
    }

    fn learn_rules(&mut self, rules: &[RuleKey], interner: &mut Interner) {
        for rule in rules {
            let Err(place) = self.place(rule.id) else { continue };
            if self.keys.len() >= MAX_KEYS {
                return;
            }
            let id = SeriesId {
                namespace: interner.name(cut(&rule.namespace, MAX_NAME)),
                peer: interner.name(cut(&rule.policy, MAX_NAME)),
                route: interner.name(cut(&rule.rule, MAX_NAME)),
                ..SeriesId::other(self.reporter.clone(), Direction::Policy, false)
            };
            self.keys.insert(place, Key { number: rule.id, series: Some(interner.id(id)) });
        }
    }

    /// Where a key is, or where it would be.
    fn place(&self, key: u32) -> Result<usize, usize> {
        self.keys.binary_search_by_key(&key, |known| known.number)
    }

    /// Whether counts under a key can be taken. With too many keys in one report every other one is [`OTHER`], because a
    /// sidecar that is asked for it again and again would send all of them for ever.
    pub(super) fn knows(&self, key: u32) -> bool {
        self.keys.len() >= MAX_KEYS || self.place(key).is_ok()
    }

    /// The series of a key. `None`: it is not counted.
    pub(super) fn series(&self, key: u32) -> Option<Arc<SeriesId>> {
        match self.place(key).ok().and_then(|place| self.keys.get(place)) {
            Some(known) => known.series.clone(),
            // Which side it was seen from was in the key that was cut off; most of a sidecar's series are outbound.
            None => Some(Arc::new(SeriesId::other(self.reporter.clone(), Direction::Outbound, false))),
        }
    }
}

/// A closed set: it becomes a label.
fn protocol(name: &str) -> &str {
    match name {
        "" | "http1" | "http2" | "opaque" => name,
        _ => OTHER,
    }
}

/// The first bytes of a name, at a character's end.
fn cut(name: &str, most: usize) -> &str {
    if name.len() <= most {
        return name;
    }
    let end = (0..=most).rev().find(|end| name.is_char_boundary(*end));
    end.and_then(|end| name.get(..end)).unwrap_or_default()
}
