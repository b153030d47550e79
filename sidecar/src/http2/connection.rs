//! The state of a connection that its streams and its driver share, and what frames of the peer do to it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::block::Block;
use super::frame::{self, ErrorCode, Header, MAX_PAYLOAD};
use super::hpack::encode;
use super::stream::{Failed, StreamState};
use super::{CONNECTION_WINDOW, MAX_HEADER_LIST, MAX_STREAMS, SHARED_STREAM_WINDOW, SHARED_STREAMS, STREAM_WINDOW};
use crate::output::Output;
use crate::turns::Turns;

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
/// Frames of no effect that a peer may send in a second (CVE-2019-9512, -9515): far above what an honest one needs.
const CONTROL_FRAMES: u32 = 20_000;
/// Streams that a client may give up before their answers, beyond those that it lets end (CVE-2023-44487): once all that
/// it may have open, and this many a second.
const RESETS_PER_SECOND: u32 = 200;
/// Requests whose client has gone, or that were refused, may still be ending: beside those that are open.
const MAX_LIVE: usize = 2 * MAX_STREAMS as usize;

/// Which side opened the connection: clients open streams, servers accept them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

/// Why a connection is ended, for the peer (GOAWAY) and for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) code: ErrorCode,
    pub(super) why: &'static str,
}

impl Broken {
    pub(super) fn protocol(why: &'static str) -> Self {
        Self { code: ErrorCode::PROTOCOL_ERROR, why }
    }

    pub(super) fn size(why: &'static str) -> Self {
        Self { code: ErrorCode::FRAME_SIZE_ERROR, why }
    }

    fn calm(why: &'static str) -> Self {
        Self { code: ErrorCode::ENHANCE_YOUR_CALM, why }
    }
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

    /// Bytes of DATA have been read or dropped: the peer may send as many again, once they are half of what it may.
    pub(super) fn give_back(&mut self, bytes: u32) {
        self.consumed += bytes;
        if self.consumed >= self.window / 2 {
            let grant = std::mem::take(&mut self.consumed);
            self.granted += grant;
            self.append(|out| frame::put(out, frame::WINDOW_UPDATE, 0, 0, &grant.to_be_bytes()));
        }
    }

    /// A stream has ended; whether it was there.
    pub(super) fn forget(&mut self, id: u32) -> bool {
        let was_there = self.streams.remove(&id).is_some();
        if was_there && self.role == Role::Server {
            self.resets_left = (self.resets_left + 1).min(MAX_STREAMS);
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

    /// Ends a stream of whose peer this was a mistake.
    fn fail(&mut self, id: u32, code: ErrorCode) {
        if let Some(state) = self.streams.get(&id) {
            let mut state = state.borrow_mut();
            state.send_ended = true;
            state.fail(Failed::Lost);
        }
        self.reset(id, code);
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
    pub(super) fn open(&mut self, is_head: bool, end: bool) -> Option<(u32, Rc<RefCell<StreamState>>)> {
        if self.is_closed || self.is_leaving || self.next_stream > i32::MAX as u32 {
            return None;
        }
        let id = self.next_stream;
        self.next_stream += 2;
        let mut state = StreamState::new(SHARED_STREAM_WINDOW, self.peer_window);
        (state.is_head, state.send_ended) = (is_head, end);
        let state = Rc::new(RefCell::new(state));
        self.streams.insert(id, Rc::clone(&state));
        Some((id, state))
    }

    /// Whether the peer has ever opened this stream, or we have.
    fn is_known(&self, id: u32) -> bool {
        match (self.role, id % 2) {
            (Role::Server, 1) => id <= self.last_accepted,
            (Role::Client, 1) => id < self.next_stream,
            // Servers open none, since nothing may be pushed.
            _ => false,
        }
    }

    /// A frame has come for a stream that is not there: too late for one that was reset here.
    fn too_late(&mut self, id: u32) -> Result<(), Broken> {
        if !self.is_known(id) {
            return Err(Broken::protocol("a frame for a stream that was never opened"));
        }
        self.control()?;
        if !self.were_reset.contains(&id) {
            self.refuse(id, ErrorCode::STREAM_CLOSED);
        }
        Ok(())
    }

    /// DATA has come: its content without padding, and the length of its payload.
    pub(super) fn data_frame(&mut self, header: Header, content: Bytes) -> Result<(), Broken> {
        let taken = header.length as u32;
        let Some(granted) = self.granted.checked_sub(taken) else {
            return Err(Broken { code: ErrorCode::FLOW_CONTROL_ERROR, why: "more bytes than were granted" });
        };
        self.granted = granted;
        let end = header.has(frame::END_STREAM);
        if content.is_empty() && !end {
            self.control()?;
        }
        let Some(state) = self.streams.get(&header.stream) else {
            self.give_back(taken);
            return self.too_late(header.stream);
        };
        let state = Rc::clone(state);
        let mut state = state.borrow_mut();
        // What nobody will read is given back at once: padding, and what comes for a reader that has gone.
        let kept = state.keeps(&content);
        let result = state.data(content, taken, end);
        let is_ended = state.is_ended();
        drop(state);
        self.give_back(if result.is_ok() { taken - kept } else { taken });
        match result {
            Err(code) => self.fail(header.stream, code),
            Ok(()) if is_ended => drop(self.forget(header.stream)),
            Ok(()) => {}
        }
        Ok(())
    }

    /// A header block has come.
    pub(super) fn block_frame(&mut self, id: u32, end: bool, block: Block) -> Result<(), Broken> {
        if let Some(state) = self.streams.get(&id) {
            let state = Rc::clone(state);
            let mut state = state.borrow_mut();
            let result = state.block(block, end);
            let is_ended = state.is_ended();
            drop(state);
            match result {
                Err(code) => self.fail(id, code),
                Ok(()) if is_ended => drop(self.forget(id)),
                Ok(()) => {}
            }
            return Ok(());
        }
        if self.role == Role::Client || id <= self.last_accepted {
            if self.is_known(id) && !self.were_reset.contains(&id) {
                let code = ErrorCode::STREAM_CLOSED;
                return Err(Broken { code, why: "a header block for a stream that has ended" });
            }
            return self.too_late(id);
        }
        if id % 2 == 0 {
            return Err(Broken::protocol("a client opened a stream with an even number"));
        }
        if self.leaving == Leaving::Heard {
            // The client knows that nobody has looked at it.
            return Ok(());
        }
        self.last_accepted = id;
        if self.streams.len() >= MAX_STREAMS as usize || self.live >= MAX_LIVE {
            self.refuse(id, ErrorCode::REFUSED_STREAM);
            return self.premature_reset();
        }
        if !block.is_request() || (end && block.declared().is_some_and(|length| length > 0)) {
            self.refuse(id, ErrorCode::PROTOCOL_ERROR);
            return self.premature_reset();
        }
        let state = StreamState::of_request(STREAM_WINDOW, self.peer_window, &block, end);
        let state = Rc::new(RefCell::new(state));
        self.streams.insert(id, Rc::clone(&state));
        self.accepted.push_back(Accepted { id, block, end, state });
        Ok(())
    }

    /// RST_STREAM has come.
    pub(super) fn reset_frame(&mut self, id: u32, code: ErrorCode) -> Result<(), Broken> {
        if !self.is_known(id) {
            return Err(Broken::protocol("a reset of a stream that was never opened"));
        }
        let Some(state) = self.streams.remove(&id) else { return self.control() };
        let is_premature = {
            let mut state = state.borrow_mut();
            let is_premature = !state.send_ended;
            state.send_ended = true;
            state.fail(Failed::Reset(code));
            is_premature
        };
        self.forget(id);
        if self.role == Role::Server && is_premature { self.premature_reset() } else { Ok(()) }
    }

    /// SETTINGS have come.
    pub(super) fn settings(&mut self, payload: &[u8]) -> Result<(), Broken> {
        self.control()?;
        let (entries, _) = payload.as_chunks::<6>();
        for [n0, n1, v0, v1, v2, v3] in entries {
            let value = u32::from_be_bytes([*v0, *v1, *v2, *v3]);
            match u16::from_be_bytes([*n0, *n1]) {
                frame::HEADER_TABLE_SIZE => self.table_size_is_due |= value < 4096,
                frame::ENABLE_PUSH if value > 1 => return Err(Broken::protocol("a bad ENABLE_PUSH")),
                frame::MAX_CONCURRENT_STREAMS => self.peer_streams = Some(value as usize),
                frame::INITIAL_WINDOW_SIZE => self.initial_window(value)?,
                frame::MAX_FRAME_SIZE if !(16_384..1 << 24).contains(&value) => {
                    return Err(Broken::protocol("a bad MAX_FRAME_SIZE"));
                }
                _ => {}
            }
        }
        self.is_settled = true;
        if let Some(waker) = self.waits_for_settings.take() {
            waker.wake();
        }
        self.append(|out| frame::put(out, frame::SETTINGS, frame::ACK, 0, &[]));
        Ok(())
    }

    /// The peer takes another number of bytes of each stream; those that are open get the difference.
    fn initial_window(&mut self, value: u32) -> Result<(), Broken> {
        let error = Broken { code: ErrorCode::FLOW_CONTROL_ERROR, why: "a window that is too large" };
        let value = i64::from(value);
        if value > i64::from(i32::MAX) {
            return Err(error);
        }
        let wider = value - std::mem::replace(&mut self.peer_window, value);
        self.streams.values().try_for_each(|state| state.borrow_mut().widen(wider)).map_err(|_| error)
    }

    /// WINDOW_UPDATE has come.
    pub(super) fn window_update(&mut self, id: u32, bytes: u32) -> Result<(), Broken> {
        if id == 0 {
            if bytes == 0 {
                return Err(Broken::protocol("a window that grows by nothing"));
            }
            self.send_window += i64::from(bytes);
            if self.send_window > i64::from(i32::MAX) {
                let code = ErrorCode::FLOW_CONTROL_ERROR;
                return Err(Broken { code, why: "a window that is too large" });
            }
            self.window_turns.call_all();
            return Ok(());
        }
        let Some(state) = self.streams.get(&id) else {
            // It may have ended meanwhile.
            return if self.is_known(id) {
                self.control()
            } else {
                Err(Broken::protocol("a window of a stream that was never opened"))
            };
        };
        let widened = if bytes == 0 {
            Err(ErrorCode::PROTOCOL_ERROR)
        } else {
            state.borrow_mut().widen(bytes.into())
        };
        if let Err(code) = widened {
            self.fail(id, code);
        }
        Ok(())
    }

    /// PING has come.
    pub(super) fn ping(&mut self, is_answer: bool, payload: &[u8]) -> Result<(), Broken> {
        if !is_answer {
            self.control()?;
            self.append(|out| frame::put(out, frame::PING, frame::ACK, 0, payload));
        } else if self.leaving == Leaving::Announced {
            self.leaving = Leaving::Heard;
            self.go_away(self.last_accepted, ErrorCode::NO_ERROR, "");
        }
        Ok(())
    }

    /// Tells the client to open no more streams.
    pub(super) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
            self.go_away(i32::MAX as u32, ErrorCode::NO_ERROR, "");
            self.append(|out| frame::put(out, frame::PING, 0, 0, b"leaving?"));
        }
    }

    /// GOAWAY has come: a server takes no streams beyond the last one that it names.
    pub(super) fn goaway_frame(&mut self, last: u32) {
        if self.role == Role::Server {
            return;
        }
        self.is_leaving = true;
        let beyond: Vec<u32> = self.streams.keys().copied().filter(|id| *id > last).collect();
        for id in beyond {
            if let Some(state) = self.streams.remove(&id) {
                let mut state = state.borrow_mut();
                state.send_ended = true;
                state.fail(Failed::Unprocessed);
            }
        }
        self.wake_driver();
    }

    /// Counts a frame that has no effect but costs something.
    ///
    /// # Errors
    /// They are too many.
    pub(super) fn control(&mut self) -> Result<(), Broken> {
        self.control_frames += 1;
        if self.control_frames < CONTROL_FRAMES {
            return Ok(());
        }
        self.control_frames = 0;
        let took = std::mem::replace(&mut self.control_since, Instant::now()).elapsed();
        if took < Duration::from_secs(1) {
            return Err(Broken::calm("too many frames without effect"));
        }
        Ok(())
    }

    /// A client has given a request up, or has sent one that is refused.
    fn premature_reset(&mut self) -> Result<(), Broken> {
        if self.resets_left == 0 {
            let since = std::mem::replace(&mut self.resets_since, Instant::now());
            let seconds = since.elapsed().as_secs().min(u64::from(MAX_STREAMS)) as u32;
            self.resets_left = (seconds * RESETS_PER_SECOND).min(MAX_STREAMS);
        }
        if self.resets_left == 0 {
            return Err(Broken::calm("too many requests that are given up"));
        }
        self.resets_left -= 1;
        Ok(())
    }
}
