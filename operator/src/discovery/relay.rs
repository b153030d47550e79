//! What sidecars report reaches the leader, whichever replica they are connected to. A replica that does not
//! lead keeps a few streams to the leader, each for a part of its pods; a report counts as taken when the leader
//! has it.
//!
//! Nothing waits for the leader: a stream whose queue is full is dropped and begun anew, with everything that
//! is known. Counts that were in it are not acknowledged, and so the sidecar reports them again.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tulle_mesh::proto::relay_client::RelayClient;
use tulle_mesh::proto::{RelayMessage, RelayReply, Resource, TelemetryAck, TelemetryReport, relay_message};

use super::acks::AckTracker;
use super::peer::{Peer, Tls};
use super::report::{Enforced, Name, SidecarEvent, message, of_sidecar};
use crate::lease::Leadership;
use crate::telemetry::{Aggregates, Taken, reporter_of};
use crate::watch::Hub;

/// Streams to the leader.
const SHARDS: usize = 4;
/// Messages that wait for the leader, per stream.
const QUEUED: usize = 4096;
/// Answers to one sidecar that wait for its session. One that is dropped costs a second report.
const ANSWERS: usize = 64;
/// A stream that ended is begun anew after this.
const AGAIN: Duration = Duration::from_millis(500);

/// Passes what this replica's sidecars report on to the leader, or, on the leader itself, to its own tracker.
pub struct LeaderRelay {
    acks: Arc<AckTracker>,
    aggregates: Arc<Aggregates>,
    /// Says of which workload a pod is.
    hub: Arc<Hub>,
    leadership: watch::Receiver<Leadership>,
    shards: [Shard; SHARDS],
    /// Sessions that wait for the leader to take a report.
    waiting: Mutex<HashMap<String, mpsc::Sender<TelemetryAck>>>,
}

/// A stream to the leader.
#[derive(Default)]
struct Shard {
    /// While there is one.
    leader: Mutex<Option<mpsc::Sender<RelayMessage>>>,
    overflow: Notify,
}

impl Shard {
    /// Sends without waiting; the stream is given up when the leader does not keep up.
    fn pass_on(&self, message: RelayMessage) {
        let mut leader = lock(&self.leader);
        if let Some(stream) = &*leader
            && stream.try_send(message).is_err()
        {
            *leader = None;
            self.overflow.notify_one();
        }
    }
}

impl LeaderRelay {
    /// A relay without a stream: [`Self::run`] keeps them.
    pub fn new(
        acks: Arc<AckTracker>,
        aggregates: Arc<Aggregates>,
        hub: Arc<Hub>,
        leadership: watch::Receiver<Leadership>,
    ) -> Arc<Self> {
        Arc::new(Self {
            acks,
            aggregates,
            hub,
            leadership,
            shards: std::array::from_fn(|_| Shard::default()),
            waiting: Mutex::default(),
        })
    }

    /// Takes a report of a sidecar of this replica.
    pub fn report(&self, pod_uid: &str, report: SidecarEvent) {
        self.acks.report(pod_uid, report, |report| {
            if let Some(shard) = self.shards.get(shard_of(pod_uid)) {
                shard.pass_on(message(pod_uid, report));
            }
        });
    }

    /// A stream of a sidecar of this replica has begun.
    pub fn begins(&self, pod_uid: &str, stream: u64) {
        self.report(pod_uid, SidecarEvent::Connected);
        self.acks.begins(pod_uid, stream);
    }

    /// Takes what a sidecar of this replica enforces in place of what it was sent last.
    pub fn enforces(&self, pod_uid: &str, stream: u64, name: &Name, enforced: Option<Enforced>) {
        self.acks.enforces((pod_uid, stream), (name, enforced), |event| {
            if let Some(shard) = self.shards.get(shard_of(pod_uid)) {
                shard.pass_on(message(pod_uid, event));
            }
        });
    }

    /// As [`AckTracker::kept`].
    pub fn kept(&self, pod_uid: &str, name: &Name, version: &str) -> (Option<Arc<Resource>>, bool) {
        self.acks.kept(pod_uid, name, version)
    }

    /// Takes counts of a sidecar of this replica. Returns the answer; `None`: it is the leader's, and comes by
    /// [`Self::telemetry_acks`].
    pub fn telemetry(&self, pod_uid: &str, report: TelemetryReport) -> Option<TelemetryAck> {
        for event in of_sidecar(&report) {
            // The report passes it on.
            self.acks.report(pod_uid, event, |_| {});
        }
        if self.leads() {
            return Some(self.count(pod_uid, &report));
        }
        if let Some(shard) = self.shards.get(shard_of(pod_uid)) {
            let message = relay_message::Message::Telemetry(report);
            shard.pass_on(RelayMessage {
                pod_uid: pod_uid.to_owned(),
                message: Some(message),
                ..Default::default()
            });
        }
        None
    }

    /// Counts a report, on the leader, whichever replica the sidecar is connected to. Returns the answer to it.
    pub fn count(&self, pod_uid: &str, report: &TelemetryReport) -> TelemetryAck {
        let reporter = reporter_of(&self.hub.model(), pod_uid);
        self.aggregates.lead(self.leadership.borrow().epoch);
        let taken = self.aggregates.add(pod_uid, reporter, report);
        TelemetryAck { sequence: report.sequence, forgotten: matches!(taken, Taken::Forgotten) }
    }

    /// Whether this replica leads.
    pub fn leads(&self) -> bool {
        self.leadership.borrow().mine
    }

    /// Who leads, as it changes.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// The leader's answers to reports.
    pub fn telemetry_acks(&self, pod_uid: &str) -> mpsc::Receiver<TelemetryAck> {
        let (sender, receiver) = mpsc::channel(ANSWERS);
        // A stream that took over under the same pod takes its answers over, too.
        lock(&self.waiting).insert(pod_uid.to_owned(), sender);
        receiver
    }

    /// A session has ended, and its receiver of [`Self::telemetry_acks`] is dropped.
    pub fn ended(&self, pod_uid: &str) {
        let mut waiting = lock(&self.waiting);
        if waiting.get(pod_uid).is_some_and(mpsc::Sender::is_closed) {
            waiting.remove(pod_uid);
        }
    }

    /// Keeps the streams to whoever leads.
    pub async fn run(self: Arc<Self>, tls: Arc<Tls>) {
        futures::future::join_all((0..SHARDS).map(|number| self.keep(number, &tls))).await;
    }

    async fn keep(&self, number: usize, tls: &Tls) {
        let Some(shard) = self.shards.get(number) else { return };
        let mut leadership = self.leadership.clone();
        loop {
            let leader = leadership.borrow_and_update().clone();
            if let (false, Some(address)) = (leader.mine, &leader.address) {
                tokio::select! {
                    end = self.forward(number, shard, address, tls) => if let Err(error) = end {
                        tracing::warn!(address, error = format!("{error:#}"), "the stream to the leader ended");
                    },
                    _ = leadership.changed() => {}
                }
                *lock(&shard.leader) = None;
                tokio::time::sleep(AGAIN).await;
            } else if leadership.changed().await.is_err() {
                return;
            }
        }
    }

    async fn forward(&self, number: usize, shard: &Shard, address: &str, tls: &Tls) -> anyhow::Result<()> {
        let peer = Peer::connect(address, tls).await?;
        let mut client = RelayClient::with_origin(peer, http::Uri::from_static("http://leader.tulle"));
        let (known, messages) = self.begin(number, shard);
        let messages = tokio_stream::iter(known).chain(ReceiverStream::new(messages));
        let exchange = async {
            let mut replies = client.forward(messages).await?.into_inner();
            while let Some(reply) = replies.message().await? {
                self.replied(reply);
            }
            Err::<(), anyhow::Error>(anyhow::anyhow!("the leader closed the stream"))
        };
        tokio::select! {
            end = exchange => end,
            () = shard.overflow.notified() => Err(anyhow::anyhow!("the leader does not keep up")),
        }
    }

    /// Everything that is known, and what is reported after it.
    fn begin(&self, number: usize, shard: &Shard) -> (Vec<RelayMessage>, mpsc::Receiver<RelayMessage>) {
        let (sender, messages) = mpsc::channel(QUEUED);
        let mut known = Vec::new();
        self.acks.snapshot(
            |uid| shard_of(uid) == number,
            |reports| {
                known.extend(reports.into_iter().map(|(uid, report)| message(&uid, report)));
                *lock(&shard.leader) = Some(sender);
            },
        );
        (known, messages)
    }

    fn replied(&self, reply: RelayReply) {
        if let Some(session) = lock(&self.waiting).get(&reply.pod_uid) {
            let RelayReply { sequence, forgotten, .. } = reply;
            let _ = session.try_send(TelemetryAck { sequence, forgotten });
        }
    }
}

/// All that is said of a pod takes one stream: in order.
fn shard_of(pod_uid: &str) -> usize {
    let mut hasher = DefaultHasher::new();
    pod_uid.hash(&mut hasher);
    usize::try_from(hasher.finish() % SHARDS as u64).unwrap_or(0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::series_key::Direction;
    use tulle_mesh::proto::{SeriesCounts, SeriesKey};

    use super::*;

    fn relay() -> Arc<LeaderRelay> {
        let (_, leadership) = watch::channel(Leadership::default());
        LeaderRelay::new(Arc::default(), Arc::default(), Arc::default(), leadership)
    }

    #[tokio::test]
    async fn a_leader_that_takes_nothing_holds_up_nobody_and_is_told_everything_anew() {
        let relay = relay();
        let number = shard_of("u");
        let shard = relay.shards.get(number).unwrap();
        let (known, mut stuck) = relay.begin(number, shard);
        assert!(known.is_empty());
        relay.report("u", SidecarEvent::Connected);
        for sequence in 0..2 * QUEUED as u64 {
            let report = TelemetryReport { sequence, ..Default::default() };
            assert_eq!(relay.telemetry("u", report), None, "nobody has taken it");
        }
        assert!(lock(&shard.leader).is_none(), "the stream was given up");
        shard.overflow.notified().await;
        let mut queued = 0;
        while stuck.recv().await.is_some() {
            queued += 1;
        }
        assert_eq!(queued, QUEUED, "no more than that waits in memory");
        let (known, _) = relay.begin(number, shard);
        assert_eq!(known, [message("u", SidecarEvent::Connected)]);
    }

    #[test]
    fn the_leader_says_so_when_it_does_not_know_the_keys_of_a_report() {
        let leader = Leadership { mine: true, ..Leadership::default() };
        let (_leading, leadership) = watch::channel(leader);
        let relay = LeaderRelay::new(Arc::default(), Arc::default(), Arc::default(), leadership);
        let counts = SeriesCounts { key: 1, classes: vec![0, 1], ..SeriesCounts::default() };
        let report =
            TelemetryReport { sequence: 1, process: 1, series: vec![counts], ..TelemetryReport::default() };
        let forgotten = TelemetryAck { sequence: 1, forgotten: true };
        assert_eq!(relay.telemetry("u", report.clone()), Some(forgotten));
        let direction = Direction::Outbound.into();
        let key = SeriesKey { id: 1, direction, protocol: "http1".into(), ..SeriesKey::default() };
        let whole = TelemetryReport { keys: vec![key], ..report };
        let counted = TelemetryAck { sequence: 1, forgotten: false };
        assert_eq!(relay.telemetry("u", whole), Some(counted));
    }

    #[tokio::test]
    async fn an_answer_reaches_the_session_that_waits_for_it() {
        let relay = relay();
        let mut acks = relay.telemetry_acks("u");
        relay.replied(RelayReply { pod_uid: "u".into(), sequence: 7, forgotten: false });
        relay.replied(RelayReply { pod_uid: "v".into(), sequence: 8, forgotten: false });
        relay.replied(RelayReply { pod_uid: "u".into(), sequence: 9, forgotten: true });
        assert_eq!(acks.recv().await, Some(TelemetryAck { sequence: 7, forgotten: false }));
        assert_eq!(acks.recv().await, Some(TelemetryAck { sequence: 9, forgotten: true }));
        drop(acks);
        relay.ended("u");
        assert!(lock(&relay.waiting).is_empty());
    }
}
