//! The state of a connection that its streams and its driver share, and what is written to it.

mod received;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::task::Waker;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::block::Block;
use super::frame::{self, ErrorCode, Header, MAX_PAYLOAD};
use super::hpack::encode;
use super::stream::{Failed, StreamState};
use super::{
    CONNECTION_WINDOW, MAX_HEADER_LIST, MAX_STREAMS, SHARED_STREAM_WINDOW, SHARED_STREAMS, STREAM_WINDOW,
};
use crate::output::Output;
use crate::turns::Turns;

pub(super) use received::Broken;

/// Senders of DATA wait while more than this waits to be written.
pub(super) const OUTPUT: usize = 128 * 1024;
/// Nothing is read from a peer for which so much waits: it gets no more answers before it has read some.
pub(super) const NO_READING: usize = 2 * OUTPUT;
/// What a stream sends before it is another's turn.
pub(super) const TURN: usize = 4 * MAX_PAYLOAD;
/// The window of a connection before its peer says otherwise (RFC 9113 §6.9.2).
const DEFAULT_WINDOW: u32 = 65_535;
/// Streams that were reset here, and of which frames may still be under way: as many as may be open.
const RESETS_KEPT: usize = MAX_STREAMS as usize;

/// Which side opened the connection: clients open streams, servers accept them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

/// How far a server has come with telling its client to leave (RFC 9113 §6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaving {
    No,
    /// Said; what the client has opened meanwhile is still taken.
    Announced,
    /// It has heard so: nothing more is taken.
    Heard,
}

/// A request that has arrived.
pub(super) struct Accepted {
    pub(super) id: u32,
    pub(super) block: Block,
    pub(super) end: bool,
    pub(super) state: Rc<RefCell<StreamState>>,
}

pub(super) struct Shared {
    pub(super) role: Role,
    pub(super) out: Output,
    /// The stream whose frame of DATA is the last in the output, and how many bytes had been copied into that before.
    last_data: Option<(u32, usize)>,
    pub(super) driver: Option<Waker>,
    pub(super) streams: HashMap<u32, Rc<RefCell<StreamState>>>,
    /// Streams whose DATA waits for room in the output, and those that wait for the connection's window.
    pub(super) turns: Turns,
    pub(super) window_turns: Turns,
    /// Bytes that the peer still takes on the whole connection.
    pub(super) send_window: i64,
    /// Bytes that the peer may still send, what it may send at most, and what has been read and not granted again.
    granted: u32,
    window: u32,
    consumed: u32,
    /// What the peer takes of a new stream at first.
    peer_window: i64,
    /// Streams that the peer takes at once, if it has said so.
    pub(super) peer_streams: Option<usize>,
    /// The peer's SETTINGS have come.
    pub(super) is_settled: bool,
    pub(super) waits_for_settings: Option<Waker>,
    /// The peer has made its table for our header fields smaller than it is by default, and wants to hear of it.
    pub(super) table_size_is_due: bool,
    pub(super) accepted: VecDeque<Accepted>,
    last_accepted: u32,
    next_stream: u32,
    /// Streams that the server has answered whole while their requests go on.
    early: Vec<u32>,
    /// The last streams that were reset here.
    were_reset: VecDeque<u32>,
    /// Streams whose halves somebody holds.
    pub(super) live: usize,
    pub(super) leaving: Leaving,
    /// No more streams: the peer, a server, has said so, or nobody is left who would open one.
    pub(super) is_leaving: bool,
    pub(super) is_closed: bool,
    control_frames: u32,
    control_since: Instant,
    resets_left: u32,
    resets_since: Instant,
}

impl Shared {
    pub(super) fn new(role: Role) -> Self {
        let window = match role {
            Role::Server => CONNECTION_WINDOW,
            Role::Client => SHARED_STREAM_WINDOW * SHARED_STREAMS,
        };
        let now = Instant::now();
        let mut shared = Self {
            role,
            out: Output::default(),
            last_data: None,
            driver: None,
            streams: HashMap::new(),
            turns: Turns::default(),
            window_turns: Turns::default(),
            send_window: DEFAULT_WINDOW.into(),
            granted: window,
            window,
            consumed: 0,
            peer_window: DEFAULT_WINDOW.into(),
            peer_streams: None,
            is_settled: false,
            waits_for_settings: None,
            table_size_is_due: false,
            accepted: VecDeque::new(),
            last_accepted: 0,
            next_stream: 1,
            early: Vec::new(),
            were_reset: VecDeque::new(),
            live: 0,
            leaving: Leaving::No,
            is_leaving: false,
            is_closed: false,
            control_frames: 0,
            control_since: now,
            resets_left: MAX_STREAMS,
            resets_since: now,
        };
        shared.greet();
        shared
    }

    /// What each side sends first (RFC 9113 §3.4).
    fn greet(&mut self) {
        let settings: &[(u16, u32)] = match self.role {
            Role::Client => &[
                (frame::ENABLE_PUSH, 0),
                (frame::INITIAL_WINDOW_SIZE, SHARED_STREAM_WINDOW),
                (frame::MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST),
            ],
            Role::Server => &[
                (frame::MAX_CONCURRENT_STREAMS, MAX_STREAMS),
                (frame::INITIAL_WINDOW_SIZE, STREAM_WINDOW),
                (frame::MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST),
            ],
        };
        let (role, wider) = (self.role, self.window - DEFAULT_WINDOW);
        self.append(|out| {
            if role == Role::Client {
                out.extend_from_slice(frame::PREFACE);
            }
            let length = settings.len() * 6;
            Header { length, kind: frame::SETTINGS, flags: 0, stream: 0 }.put(out);
            for (name, value) in settings {
                out.extend_from_slice(&name.to_be_bytes());
                out.extend_from_slice(&value.to_be_bytes());
            }
            frame::put(out, frame::WINDOW_UPDATE, 0, 0, &wider.to_be_bytes());
        });
    }

    /// Appends to what is written.
    pub(super) fn append(&mut self, write: impl FnOnce(&mut BytesMut)) {
        if self.is_closed {
            return;
        }
        self.last_data = None;
        self.out.copy(write);
        self.wake_driver();
    }

    pub(super) fn wake_driver(&self) {
        if let Some(waker) = &self.driver {
            waker.wake_by_ref();
        }
    }

    /// What waits is being written: no frame can be changed any more.
    pub(super) fn written(&mut self) {
        self.last_data = None;
        self.next_turn();
    }

    /// Calls as many of those that wait for the connection's window as it has room for, in frames.
    pub(super) fn next_window_turns(&mut self) {
        if let Ok(window @ 1..) = usize::try_from(self.send_window) {
            self.window_turns.call(window.div_ceil(MAX_PAYLOAD));
        }
    }

    /// Calls the next of those that wait for room in the output.
    pub(super) fn next_turn(&mut self) {
        if self.out.len() < OUTPUT {
            self.turns.call(1);
        }
    }

    /// Writes a block of fields.
    pub(super) fn block(&mut self, id: u32, end: bool, encode: impl FnOnce(&mut BytesMut)) {
        let is_due = std::mem::take(&mut self.table_size_is_due);
        self.append(|out| {
            frame::put_block(out, id, end, |to| {
                if is_due {
                    encode::no_table(to);
                }
                encode(to);
            });
        });
    }

    /// Writes DATA.
    pub(super) fn data(&mut self, id: u32, mut bytes: Bytes) {
        if self.is_closed {
            return;
        }
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MAX_PAYLOAD));
            let header = Header { length: piece.len(), kind: frame::DATA, flags: 0, stream: id };
            self.last_data = Some((id, self.out.copied()));
            self.out.copy(|out| header.put(out));
            self.out.piece(piece);
        }
        self.wake_driver();
    }

    /// Writes the end of a stream: with its last DATA, if that still waits.
    pub(super) fn end(&mut self, id: u32) {
        const FLAGS: usize = 4;
        if let Some((of, at)) = self.last_data
            && of == id
            && let Some(flags) = self.out.copied_mut(at + FLAGS)
        {
            *flags |= frame::END_STREAM;
            return;
        }
        self.append(|out| frame::put(out, frame::DATA, frame::END_STREAM, id, &[]));
    }

    /// Grants the peer more bytes of a stream.
    pub(super) fn grant(&mut self, id: u32, bytes: u32) {
        if self.streams.contains_key(&id) {
            self.append(|out| frame::put(out, frame::WINDOW_UPDATE, 0, id, &bytes.to_be_bytes()));
        }
    }

    /// Bytes of DATA have been read or dropped: the peer may send as many again, once they are half of what it may, or of
    /// what is left because others do not read theirs.
    pub(super) fn give_back(&mut self, bytes: u32) {
        self.consumed += bytes;
        let left = (self.window / 2).min(self.granted);
        if self.consumed > 0 && self.consumed >= left {
            let grant = std::mem::take(&mut self.consumed);
            self.granted += grant;
            self.append(|out| frame::put(out, frame::WINDOW_UPDATE, 0, 0, &grant.to_be_bytes()));
        }
    }

    /// Bytes that the peer may send, or will be granted.
    #[cfg(test)]
    pub(super) fn may_send(&self) -> u32 {
        self.granted + self.consumed
    }

    /// Whether a server answered a request before it had all of it, and still gets the rest. One that does not read that may
    /// read nothing else either.
    pub(super) fn has_early_answer(&self) -> bool {
        !self.early.is_empty()
    }

    /// A server has sent its end of a stream that goes on.
    fn note_early(&mut self, id: u32) {
        if self.role == Role::Client {
            self.early.push(id);
        }
    }

    /// A stream has come to its end: its client may give up another one.
    pub(super) fn ended(&mut self, id: u32) {
        self.forget(id);
        self.has_let_end();
    }

    /// A client has let a request end.
    pub(super) fn has_let_end(&mut self) {
        self.resets_left = (self.resets_left + 1).min(MAX_STREAMS);
    }

    /// A stream is over; whether it was there.
    fn forget(&mut self, id: u32) -> bool {
        let was_there = self.streams.remove(&id).is_some();
        if !self.early.is_empty() {
            self.early.retain(|early| *early != id);
        }
        if self.streams.is_empty() && (self.is_leaving || self.leaving == Leaving::Heard) {
            self.wake_driver();
        }
        was_there
    }

    /// Resets a stream that is there.
    pub(super) fn reset(&mut self, id: u32, code: ErrorCode) {
        if self.forget(id) {
            self.refuse(id, code);
        }
    }

    /// Resets a stream, known or not.
    fn refuse(&mut self, id: u32, code: ErrorCode) {
        if self.were_reset.len() >= RESETS_KEPT {
            self.were_reset.pop_front();
        }
        self.were_reset.push_back(id);
        self.append(|out| frame::put(out, frame::RST_STREAM, 0, id, &code.0.to_be_bytes()));
    }

    /// Ends a stream of whose peer this was a mistake (CVE-2025-8671).
    fn fail(&mut self, id: u32, code: ErrorCode) -> Result<(), Broken> {
        if let Some(state) = self.streams.get(&id) {
            let mut state = state.borrow_mut();
            state.send_ended = true;
            state.fail(Failed::Lost);
        }
        self.reset(id, code);
        if self.role == Role::Server { self.premature_reset() } else { Ok(()) }
    }

    /// Says that nothing more is taken, behind the last stream that is.
    pub(super) fn go_away(&mut self, last: u32, code: ErrorCode, why: &str) {
        self.append(|out| {
            Header { length: 8 + why.len(), kind: frame::GOAWAY, flags: 0, stream: 0 }.put(out);
            out.extend_from_slice(&last.to_be_bytes());
            out.extend_from_slice(&code.0.to_be_bytes());
            out.extend_from_slice(why.as_bytes());
        });
    }

    /// The last stream of the peer that was taken.
    pub(super) fn last_accepted(&self) -> u32 {
        self.last_accepted
    }

    /// The connection is gone, and all its streams with it.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
        for (_, state) in self.streams.drain() {
            let mut state = state.borrow_mut();
            state.send_ended = true;
            state.fail(Failed::Lost);
        }
        self.accepted.clear();
        self.turns.call_all();
        self.window_turns.call_all();
        if let Some(waker) = self.waits_for_settings.take() {
            waker.wake();
        }
    }

    /// Opens a stream, for a client.
    /// `is_unmeasured`: the length that its answer declares is none of a body.
    pub(super) fn open(&mut self, is_unmeasured: bool, end: bool) -> Option<(u32, Rc<RefCell<StreamState>>)> {
        if self.is_closed || self.is_leaving || self.next_stream > i32::MAX as u32 {
            return None;
        }
        let id = self.next_stream;
        self.next_stream += 2;
        let mut state = StreamState::new(SHARED_STREAM_WINDOW, self.peer_window);
        (state.is_unmeasured, state.send_ended) = (is_unmeasured, end);
        let state = Rc::new(RefCell::new(state));
        self.streams.insert(id, Rc::clone(&state));
        Some((id, state))
    }
}
