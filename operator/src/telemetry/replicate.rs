//! A replica that does not lead copies the leader's history, so that a new leader knows the past.
//!
//! The leader sends every slot that has ended, and then, just after each slot of ten seconds, those that ended with it.
//! What a new leader does not have is the slot that was open: at most ten seconds. One that leads goes on with what it
//! has; one that leads no more replaces what it has by what its successor sends, unless that is the shorter past: a leader
//! may have begun with nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use futures::stream::{BoxStream, StreamExt as _, unfold};
use prost::Message as _;
use tokio::sync::watch;
use tonic::Status;
use tulle_mesh::proto::relay_client::RelayClient;
use tulle_mesh::proto::{HistoryChunk, HistoryRequest, HistorySeries, HistorySlot, SeriesKey, series_key};

use super::counts::Counts;
use super::history::{Direction, FIVE, History, Interner, MAX_SERIES, MINUTE, Reporter, SeriesId, TEN};
use super::slots::add_to;
use super::{Aggregates, clock, now};
use crate::discovery::peer::{Peer, Tls};
use crate::lease::Leadership;

/// A stream that ended is begun anew after this.
const AGAIN: Duration = Duration::from_millis(500);
/// A slot is sent this long after its end.
const AFTER_END: Duration = Duration::from_millis(100);
/// A chunk is sent when it has this many bytes. The slots of its last series come on top: 200 of at most 3 kB.
const CHUNK: usize = 384 * 1024;
/// A longer message is refused.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// A stream whose reader is further behind ends: slots of 10 s that it has not got will soon be parts of longer ones.
const MAX_BEHIND: i64 = 540;
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
    /// Series that are left of this round.
    left: Vec<Arc<SeriesId>>,
    /// The first round has not ended.
    first: bool,
}

impl Default for Cursor {
    fn default() -> Self {
        Self { from: i64::MIN, until: i64::MIN, named: 0, naming: 0, left: Vec::new(), first: true }
    }
}

impl History {
    /// Begins a round: what has ended since the one before. Returns whether the reader has kept up.
    pub fn begin(&self, cursor: &mut Cursor) -> bool {
        let kept_up = cursor.until == i64::MIN || self.open - cursor.until <= MAX_BEHIND;
        (cursor.from, cursor.until) = (cursor.until, self.open);
        (cursor.named, cursor.naming) = (cursor.naming, self.next);
        cursor.left = self.series.keys().cloned().collect();
        kept_up
    }

    /// The next part of a round; `None`: it has ended.
    pub fn next_chunk(&self, cursor: &mut Cursor) -> Option<HistoryChunk> {
        let mut chunk = HistoryChunk::default();
        let mut bytes = 0;
        while bytes < CHUNK
            && let Some(id) = cursor.left.pop()
        {
            let Some(series) = self.series.get(&*id) else { continue };
            if series.number > cursor.named {
                let named = describe(series.number, &id);
                bytes += named.encoded_len() + 8;
                chunk.series.push(named);
            }
            let new = series.ended().filter(|(_, start, _)| (cursor.from..cursor.until).contains(start));
            for (step, start, body) in new {
                let mut counts = Counts::default();
                let _ = add_to(&mut counts, body, &self.reasons);
                let slot = HistorySlot {
                    series: series.number,
                    seconds: u32::try_from(step).unwrap_or_default(),
                    start_unix: start,
                    counts: Some(counts.to_proto()),
                };
                bytes += slot.encoded_len() + 8;
                chunk.slots.push(slot);
            }
        }
        if cursor.left.is_empty() && cursor.first {
            cursor.first = false;
            chunk.complete = true;
        }
        let is_empty = chunk.series.is_empty() && chunk.slots.is_empty() && !chunk.complete;
        (!is_empty).then_some(chunk)
    }

    /// Everything that has ended since the call before, with the same cursor.
    pub fn chunks_since(&self, cursor: &mut Cursor) -> Vec<HistoryChunk> {
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
        for slot in &chunk.slots {
            let step = i64::from(slot.seconds);
            let is_slot = matches!(step, TEN | MINUTE | FIVE) && slot.start_unix.rem_euclid(step) == 0;
            if let (true, Some(id), Some(counts)) = (is_slot, names.ids.get(&slot.series), &slot.counts) {
                self.add_ended(id, step, slot.start_unix, &Counts::of(counts));
            }
        }
        Ok(())
    }
}

/// The series that a stream has named.
#[derive(Debug, Default)]
pub struct Names {
    ids: HashMap<u32, Arc<SeriesId>>,
    interner: Interner,
}

impl Names {
    fn learn(&mut self, series: &HistorySeries) -> Result<()> {
        ensure!(self.ids.len() < MAX_NAMES, "the leader has named too many series");
        let Some(key) = &series.key else { return Ok(()) };
        let direction = match key.direction() {
            series_key::Direction::Outbound => Direction::Outbound,
            series_key::Direction::Inbound => Direction::Inbound,
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
        if self.is_in_use {
            let mut history = aggregates.history();
            history.sweep(now);
            return history.apply(&mut self.names, chunk);
        }
        self.beginning.apply(&mut self.names, chunk)?;
        if chunk.complete {
            let mut whole = std::mem::take(&mut self.beginning);
            whole.sweep(now);
            let mut own = aggregates.history();
            // What was copied begins at the start of a slot, a little before the leader's own.
            if own.covered(now) > whole.covered(now) + FIVE.unsigned_abs() {
                own.append(&whole, now);
            } else {
                *own = whole;
            }
            self.is_in_use = true;
        }
        Ok(())
    }
}

/// The leader's history: all that there is, and then each ten seconds as they end.
pub fn stream(aggregates: Arc<Aggregates>) -> Chunks {
    let mut cursor = Cursor::default();
    begin_round(&aggregates, &mut cursor);
    unfold(Some((aggregates, cursor)), |state| async move {
        let (aggregates, mut cursor) = state?;
        loop {
            let chunk = aggregates.history().next_chunk(&mut cursor);
            if let Some(chunk) = chunk {
                return Some((Ok(chunk), Some((aggregates, cursor))));
            }
            tokio::time::sleep(until_next_slot()).await;
            if !begin_round(&aggregates, &mut cursor) {
                let status = Status::resource_exhausted("this replica reads the history too slowly");
                return Some((Err(status), None));
            }
        }
    })
    .boxed()
}

/// Begins a round with the slots that have ended by now. Returns whether the reader has kept up.
fn begin_round(aggregates: &Aggregates, cursor: &mut Cursor) -> bool {
    let mut history = aggregates.history();
    history.sweep(now());
    history.begin(cursor)
}

/// The time until a slot of ten seconds has ended.
fn until_next_slot() -> Duration {
    let since = clock();
    let slot = Duration::from_secs(TEN.unsigned_abs());
    let into = Duration::from_millis(u64::try_from(since.as_millis() % slot.as_millis()).unwrap_or(0));
    slot.saturating_sub(into) + AFTER_END
}

/// Keeps a copy of the history of whoever leads, while this replica does not.
pub async fn follow(aggregates: Arc<Aggregates>, tls: Arc<Tls>, mut leadership: watch::Receiver<Leadership>) {
    loop {
        let leader = leadership.borrow_and_update().clone();
        if let (false, Some(address)) = (leader.mine, &leader.address) {
            tokio::select! {
                end = copy(&aggregates, address, &tls) => if let Err(error) = end {
                    tracing::warn!(address, error = format!("{error:#}"), "the stream of the leader's history ended");
                },
                _ = leadership.changed() => {}
            }
            tokio::time::sleep(AGAIN).await;
        } else if leadership.changed().await.is_err() {
            return;
        }
    }
}

async fn copy(aggregates: &Aggregates, address: &str, tls: &Tls) -> Result<()> {
    let peer = Peer::connect(address, tls).await?;
    let client = RelayClient::with_origin(peer, http::Uri::from_static("http://leader.tulle"));
    let mut client = client.max_decoding_message_size(MAX_MESSAGE);
    let mut chunks = client.history(HistoryRequest {}).await?.into_inner();
    let mut received = Received::default();
    while let Some(chunk) = chunks.message().await? {
        received.take(&chunk, aggregates, now())?;
    }
    bail!("the leader closed the stream")
}

#[cfg(test)]
mod tests;
