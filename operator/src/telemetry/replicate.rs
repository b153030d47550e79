//! A replica that does not lead copies the leader's history, so that a new leader knows the past.
//!
//! The leader sends every slot that has ended, and then, every two seconds, either the slots that have ended since, or what
//! has changed in the open one: all that a series has in it, so that nothing is counted twice whatever was copied before.
//! Slots that get counts after their end, from a sidecar that could not report for a while, are sent again in the same way,
//! and no others: of a series that got counts for twenty seconds, two slots. Both replicas write just these slots anew.
//! Single denials are sent once. A leader that ceases to lead sends once more what there is.
//!
//! ```text
//!   seconds   0        2        4        6        8        10       12
//!   reports      ──a──▶              ──b──▶             ──c──▶
//!   copies    ended    open(a)  open(a)  open(ab) open(ab) ended    open(c)
//! ```
//! What the successor of a leader that dies lacks is what was acknowledged after the last copy. A sidecar reports what it
//! has counted in up to seven seconds, and a copy is two seconds old at most: so nine seconds may be missing. What was not
//! acknowledged, sidecars report again.
//!
//! A replica that begins to lead goes on with what it has. One that leads no more replaces what it has by what its
//! successor sends, unless that is the shorter past: a leader may have begun with nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use futures::stream::{BoxStream, StreamExt as _, unfold};
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;
use tulle_mesh::proto::relay_client::RelayClient;
use tulle_mesh::proto::{
    HistoryChunk, HistoryLost, HistoryRequest, HistorySeries, HistorySlot, SeriesKey, series_key,
};

use super::counts::Counts;
use super::history::{
    Direction, FIVE, History, Interner, MAX_SERIES, MINUTE, Reporter, Series, SeriesId, Slot, TEN,
};
use super::slots::add_to;
use super::{Aggregates, clock, now};
use crate::discovery::peer::{Peer, Tls};
use crate::lease::Leadership;

/// A stream that ended is begun anew after this, and after twice as long each time that it ends again.
const AGAIN: Duration = Duration::from_millis(500);
/// But after this at the latest; and a stream that has lasted for so long has not ended again.
const AGAIN_WITHIN: Duration = Duration::from_secs(16);
/// A round begins every so many seconds; slots end with one of them.
const ROUND: Duration = Duration::from_secs(2);
/// A round begins this long after the end of a slot.
const AFTER_END: Duration = Duration::from_millis(100);
/// A chunk is sent when it has this many bytes. The slots of its last series come on top: 200 of at most 3 kB.
const CHUNK: usize = 384 * 1024;
/// Denials of a chunk, of about 400 bytes each.
const DENIALS: usize = 500;
/// A longer message is refused.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// A stream whose reader is further behind ends: slots of 10 s that it has not got will soon be parts of longer ones.
const MAX_BEHIND: i64 = 540;
/// The leader's clock may be ahead of this replica's by so many seconds.
const MAX_AHEAD: i64 = 60;
/// Series that one stream may name. Their names are forgotten with the stream.
const MAX_NAMES: usize = 20 * MAX_SERIES;

/// The leader's side of a stream.
pub type Chunks = BoxStream<'static, Result<HistoryChunk, Status>>;

/// How far a replica has got the history.
#[derive(Debug)]
pub struct Cursor {
    /// Slots that start earlier were sent in earlier rounds.
    from: i64,
    /// Slots that start at or after it belong to the next round.
    until: i64,
    /// Series up to this number were named in earlier rounds.
    named: u32,
    /// Series up to this number are named after this round.
    naming: u32,
    /// This round is about the open slot, which starts at `until`; all others about slots that have ended.
    is_of_open: bool,
    /// [`History::round`] of the last round about the open slot: what has changed since is to be sent.
    round: u32,
    /// The same of the round before that.
    changed_since: u32,
    /// The lost reports of this round are to be sent.
    owes_lost: bool,
    /// Series that are left of this round.
    left: Vec<Arc<SeriesId>>,
    /// The first round has not ended.
    first: bool,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            from: i64::MIN,
            until: i64::MIN,
            named: 0,
            naming: 0,
            is_of_open: false,
            round: 0,
            changed_since: 0,
            owes_lost: false,
            left: Vec::new(),
            first: true,
        }
    }
}

impl History {
    /// Begins a round: what has ended since the one before; if nothing has, what has changed in the open slot. Returns
    /// whether the reader has kept up.
    pub fn begin(&mut self, cursor: &mut Cursor) -> bool {
        let kept_up = cursor.until == i64::MIN || self.open - cursor.until <= MAX_BEHIND;
        cursor.is_of_open = cursor.until == self.open;
        if cursor.is_of_open {
            self.round = self.round.wrapping_add(1);
            cursor.changed_since = std::mem::replace(&mut cursor.round, self.round);
        } else {
            (cursor.from, cursor.until) = (cursor.until, self.open);
        }
        cursor.owes_lost = true;
        (cursor.named, cursor.naming) = (cursor.naming, self.next);
        cursor.left = self.series.keys().cloned().collect();
        kept_up
    }

    /// The next part of a round; `None`: it has ended.
    pub fn next_chunk(&self, cursor: &mut Cursor) -> Option<HistoryChunk> {
        let mut chunk = HistoryChunk::default();
        let mut bytes = 0;
        if std::mem::take(&mut cursor.owes_lost) {
            chunk.lost = self.lost_of(cursor);
        }
        while bytes < CHUNK
            && let Some(id) = cursor.left.pop()
        {
            let Some(series) = self.series.get(&*id) else { continue };
            if series.number > cursor.named {
                let named = describe(series.number, &id);
                bytes += named.encoded_len() + 8;
                chunk.series.push(named);
            }
            if cursor.is_of_open {
                for slot in self.changed(series, cursor) {
                    bytes += slot.encoded_len() + 8;
                    chunk.changed.push(slot);
                }
                continue;
            }
            let new = series.ended_since(cursor.from).filter(|(_, start, _)| *start < cursor.until);
            for (step, start, body) in new {
                let mut counts = Counts::default();
                let _ = add_to(&mut counts, body, &self.reasons);
                let slot = describe_slot(series.number, step, start, &counts);
                bytes += slot.encoded_len() + 8;
                chunk.slots.push(slot);
            }
        }
        if cursor.left.is_empty() && cursor.first {
            cursor.first = false;
            chunk.complete = true;
        }
        let is_empty = chunk == HistoryChunk::default();
        // Not while slots that have ended are sent: the last of them is open at the reader until it has all of it.
        if cursor.is_of_open || chunk.complete {
            chunk.open_unix = cursor.until;
        }
        (!is_empty).then_some(chunk)
    }

    /// The slots of a series that have changed since the last round about the open one.
    fn changed(&self, series: &Series, cursor: &Cursor) -> Vec<HistorySlot> {
        let late = series.late_since(cursor.changed_since, self.open);
        // One that has become a minute during this round comes with the next, when the reader has heard that its slots are
        // a part of it.
        let late = late.filter(|(step, _, _)| *step == TEN || self.open == cursor.until);
        let late = late.map(|(step, start, body)| {
            let mut counts = Counts::default();
            let _ = add_to(&mut counts, body, &self.reasons);
            describe_slot(series.number, step, start, &counts)
        });
        // One that has ended meanwhile is sent whole with the next round.
        let open = series.open_since(cursor.changed_since).filter(|_| self.open == cursor.until);
        late.chain(open.map(|counts| describe_slot(series.number, TEN, self.open, counts))).collect()
    }

    /// The lost reports of the slots that a round is about.
    fn lost_of(&self, cursor: &Cursor) -> Vec<HistoryLost> {
        let is_wanted = |start: i64| {
            if cursor.is_of_open {
                start == cursor.until
            } else {
                (cursor.from..cursor.until).contains(&start)
            }
        };
        let lost = self.lost_in(is_wanted);
        lost.map(|(start_unix, reports)| HistoryLost { start_unix, reports }).collect()
    }

    /// All of a round.
    pub fn chunks_since(&mut self, cursor: &mut Cursor) -> Vec<HistoryChunk> {
        self.begin(cursor);
        std::iter::from_fn(|| self.next_chunk(cursor)).collect()
    }

    /// Adds what another replica has sent. `names` are those of the stream.
    ///
    /// # Errors
    /// The stream has named more series than are kept.
    pub fn apply(&mut self, names: &mut Names, chunk: &HistoryChunk) -> Result<()> {
        for series in &chunk.series {
            names.learn(series)?;
        }
        for slots in chunk.slots.chunk_by(|a, b| a.series == b.series) {
            self.apply_slots(names, slots);
        }
        if chunk.open_unix > 0 {
            self.sweep(chunk.open_unix);
        }
        for slots in chunk.changed.chunk_by(|a, b| a.series == b.series) {
            self.apply_slots(names, slots);
        }
        for lost in chunk.lost.iter().filter(|lost| lost.start_unix.rem_euclid(TEN) == 0) {
            self.set_lost(lost.start_unix, lost.reports);
        }
        Ok(())
    }

    /// Slots of one series.
    fn apply_slots(&mut self, names: &Names, slots: &[HistorySlot]) {
        let Some(id) = slots.first().and_then(|slot| names.ids.get(&slot.series)) else { return };
        let known = slots.iter().filter_map(|slot| {
            let (step, start) = (i64::from(slot.seconds), slot.start_unix);
            let is_slot = matches!(step, TEN | MINUTE | FIVE) && start.rem_euclid(step) == 0;
            let is_slot = is_slot && names.kept_until.is_none_or(|until| step == TEN || start >= until);
            let counts = slot.counts.as_ref().filter(|_| is_slot)?;
            Some(Slot { step, start, counts: Counts::of(counts) })
        });
        self.set(id, known);
    }
}

/// The series that a stream has named.
#[derive(Debug, Default)]
pub struct Names {
    ids: HashMap<u32, Arc<SeriesId>>,
    interner: Interner,
    /// This replica knew more than the leader, and has kept it: until this time, when what the leader knows begins. A minute
    /// in which that lies is not all of it.
    kept_until: Option<i64>,
}

impl Names {
    fn learn(&mut self, series: &HistorySeries) -> Result<()> {
        ensure!(self.ids.len() < MAX_NAMES, "the leader has named too many series");
        let Some(key) = &series.key else { return Ok(()) };
        let direction = match key.direction() {
            series_key::Direction::Outbound => Direction::Outbound,
            series_key::Direction::Inbound => Direction::Inbound,
            series_key::Direction::Policy => Direction::Policy,
            // Of a newer version: its slots are skipped.
            series_key::Direction::Unspecified => return Ok(()),
        };
        let mut name = |name: &str| self.interner.name(name);
        let id = SeriesId {
            reporter: Reporter {
                namespace: name(&series.namespace),
                kind: name(&series.kind),
                workload: name(&series.workload),
            },
            direction,
            namespace: name(&key.namespace),
            peer: name(&key.peer),
            revision: name(&key.revision),
            route: name(&key.route),
            protocol: name(&key.protocol),
            mtls: key.mtls,
        };
        let id = self.interner.id(id);
        self.ids.insert(series.id, id);
        Ok(())
    }
}

fn describe(number: u32, id: &SeriesId) -> HistorySeries {
    HistorySeries {
        id: number,
        namespace: id.reporter.namespace.to_string(),
        kind: id.reporter.kind.to_string(),
        workload: id.reporter.workload.to_string(),
        key: Some(SeriesKey {
            id: 0,
            direction: id.direction.to_proto().into(),
            namespace: id.namespace.to_string(),
            peer: id.peer.to_string(),
            revision: id.revision.to_string(),
            route: id.route.to_string(),
            protocol: id.protocol.to_string(),
            mtls: id.mtls,
        }),
    }
}

fn describe_slot(series: u32, step: i64, start_unix: i64, counts: &Counts) -> HistorySlot {
    HistorySlot {
        series,
        seconds: u32::try_from(step).unwrap_or_default(),
        start_unix,
        counts: Some(counts.to_proto()),
    }
}

/// What a replica has got by one stream.
#[derive(Debug, Default)]
struct Received {
    names: Names,
    /// The leader's history as far as it has come.
    beginning: History,
    /// All of it has come, and is in this replica's own.
    is_in_use: bool,
}

impl Received {
    /// Takes a chunk. The replica's own history is replaced once all of the leader's is there: a stream that breaks off
    /// before costs nothing. Where its own goes further back, it stays, and gets what the leader has counted since.
    fn take(&mut self, chunk: &HistoryChunk, aggregates: &Aggregates, now: i64) -> Result<()> {
        // Slots never end again that have ended here: with those of the future, windows of a minute would have all that
        // is counted until then.
        let ahead = chunk.open_unix.saturating_sub(now);
        ensure!(
            ahead <= MAX_AHEAD,
            "the leader's clock is {ahead} s ahead of this replica's: are both nodes' clocks right?"
        );
        aggregates.copy_denials(&chunk.denials, now);
        if self.is_in_use {
            // Swept by the leader's clock: its slots end here when all of them has come.
            return aggregates.history().apply(&mut self.names, chunk);
        }
        self.beginning.apply(&mut self.names, chunk)?;
        if chunk.complete {
            let mut whole = std::mem::take(&mut self.beginning);
            // A leader of an earlier version does not say which slot is open.
            let now = if chunk.open_unix > 0 { chunk.open_unix } else { now };
            whole.sweep(now);
            let mut own = aggregates.history();
            // What was copied begins at the start of a slot, a little before the leader's own.
            if own.covered(now) > whole.covered(now) + FIVE.unsigned_abs() {
                self.names.kept_until = Some(whole.began.unwrap_or(now));
                own.append(&whole, now);
            } else {
                *own = whole;
            }
            self.is_in_use = true;
        }
        Ok(())
    }
}

/// The leader's history: all that there is, and then what is new every two seconds, as long as this replica leads.
pub fn stream(aggregates: Arc<Aggregates>, leadership: watch::Receiver<Leadership>) -> Chunks {
    let cursor = Cursor::default();
    let mut sender =
        Sender { aggregates, leadership, cursor, denials: 0, owes_denials: false, at_once: 1, ends: false };
    sender.begin_round();
    unfold(Some(sender), |sender| async move {
        let mut sender = sender?;
        match sender.next().await {
            Ok(chunk) => Some((Ok(chunk), Some(sender))),
            Err(status) => Some((Err(status), None)),
        }
    })
    .boxed()
}

/// Sends the history to one replica.
struct Sender {
    aggregates: Arc<Aggregates>,
    leadership: watch::Receiver<Leadership>,
    cursor: Cursor,
    /// Which denials are to be sent next, as the aggregates number them.
    denials: u64,
    /// The denials of this round are to be sent.
    owes_denials: bool,
    /// Rounds that begin without waiting. After the first round the open slot is missing; and after the end of a slot a
    /// round has only what has ended.
    at_once: u8,
    /// This replica leads no more.
    ends: bool,
}

impl Sender {
    async fn next(&mut self) -> Result<HistoryChunk, Status> {
        loop {
            if std::mem::take(&mut self.owes_denials) {
                let denials = self.aggregates.denials_since(&mut self.denials, DENIALS);
                self.owes_denials = denials.len() == DENIALS;
                if !denials.is_empty() {
                    return Ok(HistoryChunk { denials, ..HistoryChunk::default() });
                }
            }
            let chunk = self.aggregates.history().next_chunk(&mut self.cursor);
            if let Some(chunk) = chunk {
                return Ok(chunk);
            }
            if let Some(left) = self.at_once.checked_sub(1) {
                self.at_once = left;
            } else if self.ends {
                return Err(Status::unavailable("this replica does not lead any more"));
            } else {
                tokio::select! {
                    () = tokio::time::sleep(until_next_round()) => {}
                    () = leads_no_more(&mut self.leadership) => {
                        self.ends = true;
                        self.at_once = 1;
                    }
                }
            }
            if !self.begin_round() {
                return Err(Status::resource_exhausted("this replica reads the history too slowly"));
            }
        }
    }

    /// Begins a round with what there is by now. Returns whether the reader has kept up.
    fn begin_round(&mut self) -> bool {
        self.owes_denials = true;
        let mut history = self.aggregates.history();
        history.sweep(now());
        history.begin(&mut self.cursor)
    }
}

async fn leads_no_more(leadership: &mut watch::Receiver<Leadership>) {
    // An error: the election has ended, and nobody leads here.
    let _ = leadership.wait_for(|leadership| !leadership.mine).await;
}

/// The time until a round begins: the end of each slot is one of these times.
fn until_next_round() -> Duration {
    let into = Duration::from_millis(u64::try_from(clock().as_millis() % ROUND.as_millis()).unwrap_or(0));
    ROUND.saturating_sub(into) + AFTER_END
}

/// Keeps a copy of the history of whoever leads, while this replica does not.
pub async fn follow(aggregates: Arc<Aggregates>, tls: Arc<Tls>, mut leadership: watch::Receiver<Leadership>) {
    let mut again = AGAIN;
    loop {
        let leader = leadership.borrow_and_update().clone();
        if let (false, Some(address)) = (leader.mine, &leader.address) {
            let (role, begun) = (leadership.clone(), Instant::now());
            tokio::select! {
                end = copy(&aggregates, address, &tls, &role) => if let Err(error) = end {
                    tracing::warn!(address, error = format!("{error:#}"), "the stream of the leader's history ended");
                },
                _ = leadership.changed() => {}
            }
            // A leader that cannot reach the API server ends its streams, and goes on to be named as the leader.
            again = if begun.elapsed() >= AGAIN_WITHIN { AGAIN } else { (again * 2).min(AGAIN_WITHIN) };
            tokio::select! {
                () = tokio::time::sleep(again) => {}
                _ = leadership.changed() => again = AGAIN,
            }
        } else if leadership.changed().await.is_err() {
            return;
        }
    }
}

async fn copy(
    aggregates: &Aggregates,
    address: &str,
    tls: &Tls,
    role: &watch::Receiver<Leadership>,
) -> Result<()> {
    let peer = Peer::connect(address, tls).await?;
    let client = RelayClient::with_origin(peer, http::Uri::from_static("http://leader.tulle"));
    let mut client = client.max_decoding_message_size(MAX_MESSAGE);
    let mut chunks = client.history(HistoryRequest {}).await?.into_inner();
    let mut received = Received::default();
    while let Some(chunk) = chunks.message().await? {
        // It would replace what has been counted here since.
        ensure!(!role.borrow().mine, "this replica leads now");
        received.take(&chunk, aggregates, now())?;
    }
    bail!("the leader closed the stream")
}

#[cfg(test)]
mod tests;
