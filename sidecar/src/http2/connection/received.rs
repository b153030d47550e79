//! What the frames of a peer do to a connection.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Accepted, Leaving, Role, Shared};
use crate::http2::block::Block;
use crate::http2::frame::{self, ErrorCode, Header};
use crate::http2::stream::{Failed, StreamState};
use crate::http2::{MAX_STREAMS, STREAM_WINDOW};

/// Frames of no effect that a peer may send in a second (CVE-2019-9512, -9515): far above what an honest one needs.
const CONTROL_FRAMES: u32 = 20_000;
/// Streams that a client may give up before their answers, beyond those that it lets end (CVE-2023-44487): once all that
/// it may have open, and this many a second.
const RESETS_PER_SECOND: u32 = 200;
/// A window that grows by less is hardly worth the frame.
const SMALL_UPDATE: u32 = 256;
/// Requests whose client has gone, or that were refused, may still be ending: beside those that are open.
const MAX_LIVE: usize = 2 * MAX_STREAMS as usize;

/// Why a connection is ended, for the peer (GOAWAY) and for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http2) struct Broken {
    pub(in crate::http2) code: ErrorCode,
    pub(in crate::http2) why: &'static str,
}

impl Broken {
    pub(in crate::http2) fn protocol(why: &'static str) -> Self {
        Self { code: ErrorCode::PROTOCOL_ERROR, why }
    }

    pub(in crate::http2) fn size(why: &'static str) -> Self {
        Self { code: ErrorCode::FRAME_SIZE_ERROR, why }
    }

    fn calm(why: &'static str) -> Self {
        Self { code: ErrorCode::ENHANCE_YOUR_CALM, why }
    }
}

const TOO_WIDE: Broken = Broken { code: ErrorCode::FLOW_CONTROL_ERROR, why: "a window that is too large" };

impl Shared {
    /// Whether the peer has ever opened this stream, or we have.
    fn is_known(&self, id: u32) -> bool {
        match (self.role, id % 2) {
            // Once it has been told to leave, what it opens all the same is not looked at.
            (Role::Server, 1) => id <= self.last_accepted || self.leaving == Leaving::Heard,
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
    pub(in crate::http2) fn data_frame(&mut self, header: Header, content: Bytes) -> Result<(), Broken> {
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
        let (is_ended, is_early) = (state.is_ended(), state.peer_ended);
        drop(state);
        self.give_back(if result.is_ok() { taken - kept } else { taken });
        match result {
            Err(code) => return self.fail(header.stream, code),
            Ok(()) if is_ended => self.ended(header.stream),
            Ok(()) if is_early => self.note_early(header.stream),
            Ok(()) => {}
        }
        Ok(())
    }

    /// A header block has come.
    pub(in crate::http2) fn block_frame(&mut self, id: u32, end: bool, block: Block) -> Result<(), Broken> {
        if let Some(state) = self.streams.get(&id) {
            let state = Rc::clone(state);
            let mut state = state.borrow_mut();
            let result = state.block(block, end);
            let (is_ended, is_early) = (state.is_ended(), state.peer_ended);
            drop(state);
            match result {
                Err(code) => return self.fail(id, code),
                Ok(()) if is_ended => self.ended(id),
                Ok(()) if is_early => self.note_early(id),
                Ok(()) => {}
            }
            return Ok(());
        }
        if self.role == Role::Client || id <= self.last_accepted {
            // A server may not have come to the reset of a stream that was given up long ago.
            if self.role == Role::Server && self.is_known(id) && !self.were_reset.contains(&id) {
                let code = ErrorCode::STREAM_CLOSED;
                return Err(Broken { code, why: "a header block for a stream that has ended" });
            }
            return self.too_late(id);
        }
        if id.is_multiple_of(2) {
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
    pub(in crate::http2) fn reset_frame(&mut self, id: u32, code: ErrorCode) -> Result<(), Broken> {
        if !self.is_known(id) {
            return Err(Broken::protocol("a reset of a stream that was never opened"));
        }
        let Some(state) = self.streams.remove(&id) else { return self.control() };
        let is_premature = {
            let mut state = state.borrow_mut();
            let is_premature = !state.send_ended;
            if code == ErrorCode::NO_ERROR {
                state.end_by_length();
            }
            state.send_ended = true;
            state.fail(Failed::Reset(code));
            is_premature
        };
        self.forget(id);
        if self.role == Role::Server && is_premature { self.premature_reset() } else { Ok(()) }
    }

    /// SETTINGS have come.
    pub(in crate::http2) fn settings(&mut self, payload: &[u8]) -> Result<(), Broken> {
        self.control()?;
        let (entries, _) = payload.as_chunks::<6>();
        let mut window = None;
        for [n0, n1, v0, v1, v2, v3] in entries {
            let value = u32::from_be_bytes([*v0, *v1, *v2, *v3]);
            match u16::from_be_bytes([*n0, *n1]) {
                frame::HEADER_TABLE_SIZE => self.table_size_is_due |= value < 4096,
                frame::ENABLE_PUSH if value > 1 => return Err(Broken::protocol("a bad ENABLE_PUSH")),
                frame::MAX_CONCURRENT_STREAMS => self.peer_streams = Some(value as usize),
                frame::INITIAL_WINDOW_SIZE if value > i32::MAX as u32 => return Err(TOO_WIDE),
                frame::INITIAL_WINDOW_SIZE => window = Some(value),
                frame::MAX_FRAME_SIZE if !(16_384..1 << 24).contains(&value) => {
                    return Err(Broken::protocol("a bad MAX_FRAME_SIZE"));
                }
                _ => {}
            }
        }
        // Each goes over all streams: the last one counts.
        if let Some(window) = window {
            self.initial_window(window)?;
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
        let value = i64::from(value);
        let wider = value - std::mem::replace(&mut self.peer_window, value);
        self.streams.values().try_for_each(|state| state.borrow_mut().widen(wider)).map_err(|_| TOO_WIDE)
    }

    /// WINDOW_UPDATE has come.
    pub(in crate::http2) fn window_update(&mut self, id: u32, bytes: u32) -> Result<(), Broken> {
        if id == 0 {
            if bytes == 0 {
                return Err(Broken::protocol("a window that grows by nothing"));
            }
            self.send_window += i64::from(bytes);
            if self.send_window > i64::from(i32::MAX) {
                return Err(TOO_WIDE);
            }
            if bytes < SMALL_UPDATE {
                self.control()?;
            }
            self.next_window_turns();
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
        let widened =
            if bytes == 0 { Err(ErrorCode::PROTOCOL_ERROR) } else { state.borrow_mut().widen(bytes.into()) };
        widened.or_else(|code| self.fail(id, code))
    }

    /// PING has come.
    pub(in crate::http2) fn ping(&mut self, is_answer: bool, payload: &[u8]) -> Result<(), Broken> {
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
    pub(in crate::http2) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
            self.go_away(i32::MAX as u32, ErrorCode::NO_ERROR, "");
            self.append(|out| frame::put(out, frame::PING, 0, 0, b"leaving?"));
        }
    }

    /// GOAWAY has come: a server takes no streams beyond the last one that it names.
    pub(in crate::http2) fn goaway_frame(&mut self, last: u32) {
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
    pub(in crate::http2) fn control(&mut self) -> Result<(), Broken> {
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
    pub(super) fn premature_reset(&mut self) -> Result<(), Broken> {
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
