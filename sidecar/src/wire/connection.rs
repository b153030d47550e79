//! The state of a connection that its streams and its driver share.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tulle_mesh::wire::frame::{self, Code, Frame, Kind};
use tulle_mesh::wire::{CONNECTION_CREDIT, CONNECTION_GROWTH, MAX_HEAD, MAX_PAYLOAD, MAX_STREAMS};

use super::stream::{Event, Receiver, Sender, StreamError, StreamState, reset};
use crate::output::Output;
use crate::turns::Turns;

/// Senders of DATA wait while more than this waits to be written, here or in TLS.
pub(super) const OUTPUT: usize = 128 * 1024;
/// Streams of which little has moved in this second wait at this only: they are not held up by bulk.
pub(super) const SMALL_OUTPUT: usize = OUTPUT * 2;
/// From here on no stream is opened or accepted. Heads do not wait, and each stream brings one.
const NO_MORE_STREAMS: usize = OUTPUT * 4;
/// More than this waits only for a peer that does not read: the connection is closed. Every stream may have its
/// head in the output beside the DATA.
pub(super) const MAX_WAITING: usize = NO_MORE_STREAMS + MAX_STREAMS * MAX_HEAD;
/// What TLS takes at once: all that may wait, with the last turn and small frames. A single write of it costs one system
/// call, and wakes the peer once.
pub const TLS_BUFFER: usize = OUTPUT + TURN + 16 * 1024;
/// What a stream sends before it is another's turn: half a read of an application's connection, in full frames.
pub(super) const TURN: usize = 4 * MAX_PAYLOAD;
/// A stream of which this much has moved in either direction carries bulk.
pub(super) const BULK: u32 = 1024 * 1024;
/// One of which less than this moves in a second does not, and does not need a wide window.
pub(super) const QUIET: u32 = 64 * 1024;

/// Which side opened the connection: clients open streams, servers accept them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens streams.
    Client,
    /// Accepts streams.
    Server,
}

/// A connection, as its streams and its owner see it.
#[derive(Clone)]
pub struct Connection {
    pub(super) shared: Rc<RefCell<Shared>>,
}

/// A stream that the peer opened: its head and its two halves.
pub(super) type Accepted = (Bytes, Sender, Receiver);

pub(super) struct Shared {
    pub(super) role: Role,
    /// Frames that wait for the driver.
    pub(super) out: Output,
    /// Bytes that the driver has taken, and that it or TLS has not yet written.
    pub(super) writing: usize,
    /// Streams whose DATA waits for room in the output.
    pub(super) turns: Turns,
    /// Streams that carry bulk.
    bulk: Vec<u32>,
    pub(super) driver: Option<Waker>,
    pub(super) streams: HashMap<u32, Rc<RefCell<StreamState>>>,
    next_stream: u32,
    last_accepted: u32,
    /// Bytes of DATA that the peer still takes on the whole connection.
    pub(super) credit: u32,
    /// Streams that wait for it.
    pub(super) credit_turns: Turns,
    /// What is left to widen the windows of streams with.
    pub(super) growth: u32,
    /// Bytes of DATA that were consumed here and not yet granted again.
    pub(super) consumed: u32,
    accepted: VecDeque<Accepted>,
    accept_waiter: Option<Waker>,
    /// No new streams: the peer said so, or the connection is too old.
    pub(super) draining: bool,
    pub(super) closed: bool,
    /// The peer has not answered a ping, and may be gone.
    pub(super) suspect: bool,
    /// Control frames received in the current second.
    pub(super) control_frames: u32,
}

/// How a peer broke the protocol beyond the shape of a frame; the connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Streams must be odd and ascend.
    #[error("the peer opened stream {0} out of order")]
    StreamOrder(u32),
    /// Only clients open streams.
    #[error("the peer, a server, opened a stream")]
    ServerOpened,
    /// More than `MAX_STREAMS`.
    #[error("the peer opened more than {MAX_STREAMS} streams")]
    TooManyStreams,
    /// More DATA than was granted.
    #[error("the peer sent more bytes than it was granted")]
    Overrun,
    /// Credit beyond what fits.
    #[error("the peer granted more credit than fits")]
    CreditOverflow,
    /// A head or trailers over `MAX_HEAD`.
    #[error("the peer sent a head of more than {MAX_HEAD} bytes")]
    HeadTooLong,
    /// Something after the end of a direction.
    #[error("the peer sent more on stream {0} after its end")]
    AfterEnd(u32),
    /// Too many frames that carry nothing.
    #[error("the peer floods control frames")]
    Flood,
}

/// Frames without content that a peer may send in a second: far above what an honest one needs.
pub(super) const CONTROL_FRAMES_PER_SECOND: u32 = 20_000;

/// Heads that may wait to be read on one stream: interim answers and the final one.
const MAX_BLOCKS: usize = 16;
/// Bytes of them.
const MAX_BLOCK_BYTES: usize = MAX_HEAD * 2;

impl Connection {
    /// A connection whose driver has not started.
    pub fn new(role: Role) -> Self {
        Self {
            shared: Rc::new(RefCell::new(Shared {
                role,
                out: Output::default(),
                writing: 0,
                turns: Turns::default(),
                bulk: Vec::new(),
                driver: None,
                streams: HashMap::new(),
                next_stream: 1,
                last_accepted: 0,
                credit: CONNECTION_CREDIT,
                credit_turns: Turns::default(),
                growth: CONNECTION_GROWTH,
                consumed: 0,
                accepted: VecDeque::new(),
                accept_waiter: None,
                draining: false,
                closed: false,
                suspect: false,
                control_frames: 0,
            })),
        }
    }

    /// Opens a stream with its head.
    ///
    /// # Errors
    /// [`StreamError::Unopened`] when the connection takes no more streams; nothing was sent.
    pub fn open(&self, head: &[u8], end: bool) -> Result<(Sender, Receiver), StreamError> {
        let mut shared = self.shared.borrow_mut();
        if !shared.takes_streams() {
            return Err(StreamError::Unopened);
        }
        let id = shared.next_stream;
        shared.next_stream = id.checked_add(2).ok_or(StreamError::Unopened)?;
        let state = StreamState::shared(end);
        shared.streams.insert(id, Rc::clone(&state));
        shared.out.block(Kind::Open, if end { frame::END } else { 0 }, id, head);
        shared.wake_driver();
        drop(shared);
        Ok((Sender::new(self.clone(), id, Rc::clone(&state)), Receiver::new(self.clone(), id, state)))
    }

    /// The next stream that the peer opened, with its head; `None` when the connection has ended.
    ///
    /// None is accepted from a peer that does not read the answers to earlier ones.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Option<(Bytes, Sender, Receiver)>> {
        let mut shared = self.shared.borrow_mut();
        if shared.waiting() < NO_MORE_STREAMS
            && let Some(stream) = shared.accepted.pop_front()
        {
            return Poll::Ready(Some(stream));
        }
        if shared.closed {
            return Poll::Ready(None);
        }
        shared.accept_waiter = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Streams that run.
    pub fn active(&self) -> usize {
        self.shared.borrow().streams.len()
    }

    /// Whether a new stream may be opened.
    pub fn takes_streams(&self) -> bool {
        self.shared.borrow().takes_streams()
    }

    /// Whether a stream that runs carries bulk: small messages had better go over another connection.
    pub fn is_bulk(&self) -> bool {
        !self.shared.borrow().bulk.is_empty()
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.borrow().closed
    }

    /// Whether it only waits for its last stream to end.
    pub fn is_draining(&self) -> bool {
        self.shared.borrow().draining
    }

    /// Lets running streams end and opens no more; a server tells its peer.
    pub fn drain(&self) {
        let mut shared = self.shared.borrow_mut();
        if !shared.draining {
            shared.draining = true;
            shared.out.frame(Kind::GoAway, 0, 0, &[]);
        }
        shared.wake_driver();
    }
}

impl Shared {
    fn takes_streams(&self) -> bool {
        let takes_any = !self.draining && !self.closed && !self.suspect;
        takes_any && self.streams.len() < MAX_STREAMS && self.waiting() < NO_MORE_STREAMS
    }

    /// Bytes that wait to be written.
    pub(super) fn waiting(&self) -> usize {
        self.out.len() + self.writing
    }

    /// Lets those go on who waited for room in the output, as far as there is some.
    pub(super) fn next_turn(&mut self) {
        self.turns.call(OUTPUT.saturating_sub(self.waiting()).div_ceil(TURN));
    }

    /// The driver has written.
    pub(super) fn written(&mut self) {
        // First those who bring something new: bulk fills whatever room there is.
        if !self.accepted.is_empty()
            && self.waiting() < NO_MORE_STREAMS
            && let Some(waiter) = self.accept_waiter.take()
        {
            waiter.wake();
        }
        self.next_turn();
    }

    /// A stream has just moved its first [`BULK`] bytes.
    pub(super) fn carries_bulk(&mut self, id: u32) {
        if self.streams.contains_key(&id) {
            self.bulk.push(id);
        }
    }

    /// Looks at the streams, about once a second: which of them still carry bulk.
    pub(super) fn tick(&mut self) {
        self.control_frames = 0;
        // Tasks that were called may be busy with something else.
        self.turns.call(usize::MAX);
        let Self { streams, bulk, growth, .. } = self;
        // Windows that are not used are taken back when others may need them.
        let scarce = *growth < CONNECTION_GROWTH / 2;
        for (id, state) in streams {
            if state.borrow_mut().tick(scarce) {
                bulk.retain(|other| other != id);
            }
        }
    }

    /// Gives memory back that a quiet connection does not need.
    pub(super) fn release(&mut self) {
        self.out.release();
        if self.streams.is_empty() {
            self.streams.shrink_to_fit();
            self.accepted.shrink_to_fit();
        }
    }

    pub(super) fn wake_driver(&mut self) {
        if let Some(waker) = self.driver.take() {
            waker.wake();
        }
    }

    /// A stream that has ended; whether it was still here. A driver that only waits for its last stream is
    /// told.
    pub(super) fn forget(&mut self, id: u32) -> bool {
        let was_here = self.streams.remove(&id).is_some();
        self.bulk.retain(|other| *other != id);
        if self.draining {
            self.wake_driver();
        }
        was_here
    }

    /// The peer may be gone: streams that wait for their answer are lost, so that their requests may go elsewhere, and none
    /// is opened until something arrives. Returns whether there is one whose answer has begun: nobody can repeat that.
    pub(super) fn suspect(&mut self) -> bool {
        self.suspect = true;
        let Self { role, streams, out, bulk, accepted, .. } = self;
        let is_server = *role == Role::Server;
        let mut has_begun = false;
        streams.retain(|id, state| {
            let mut state = state.borrow_mut();
            if state.is_answered() {
                has_begun = true;
                return true;
            }
            // Nobody waits for one that nobody has looked at, and the rest of its head may be under way.
            if is_server && (state.is_opening() || accepted.iter().any(|(_, sender, _)| sender.is(*id))) {
                return true;
            }
            // To the peer, should it be there after all.
            out.frame(Kind::Reset, 0, *id, &Code::Cancel.to_u32().to_be_bytes());
            bulk.retain(|other| other != id);
            state.push(Event::Lost);
            false
        });
        has_begun
    }

    /// Ends everything; streams see that their connection is gone. Returned are those that nobody has accepted,
    /// to be dropped when this is no longer borrowed.
    #[must_use]
    pub(super) fn close(&mut self) -> VecDeque<Accepted> {
        self.closed = true;
        for (_, state) in self.streams.drain() {
            state.borrow_mut().push(Event::Lost);
        }
        self.bulk.clear();
        self.credit_turns.call_all();
        self.turns.call_all();
        if let Some(waiter) = self.accept_waiter.take() {
            waiter.wake();
        }
        std::mem::take(&mut self.accepted)
    }

    /// Gives bytes back that a stream has consumed, once they are worth a frame.
    pub(super) fn give_back(&mut self, bytes: u32) {
        self.consumed = self.consumed.saturating_add(bytes);
        if self.consumed >= CONNECTION_CREDIT / 4 {
            let grant = std::mem::take(&mut self.consumed);
            self.out.frame(Kind::Credit, 0, 0, &grant.to_be_bytes());
            self.wake_driver();
        }
    }
}

impl Connection {
    /// Carries out one frame of the peer.
    pub(super) fn dispatch(&self, frame: Frame) -> Result<(), PeerError> {
        match frame.kind {
            Kind::Open => self.opened(frame),
            Kind::Data => self.data(frame),
            Kind::Head | Kind::Trailers => self.block(frame),
            Kind::Reset => {
                self.control()?;
                self.reset(&frame);
                Ok(())
            }
            Kind::Credit => {
                self.control()?;
                self.granted(&frame)
            }
            Kind::Ping => {
                self.control()?;
                let mut shared = self.shared.borrow_mut();
                // Whatever the peer reads tells it that we are here: no answer is added to what it does not read.
                if frame.flags & frame::ACK == 0 && shared.waiting() < SMALL_OUTPUT {
                    shared.out.frame(Kind::Ping, frame::ACK, 0, &frame.payload);
                }
                Ok(())
            }
            Kind::GoAway => {
                self.shared.borrow_mut().draining = true;
                Ok(())
            }
        }
    }

    fn control(&self) -> Result<(), PeerError> {
        let mut shared = self.shared.borrow_mut();
        shared.control_frames += 1;
        if shared.control_frames > CONTROL_FRAMES_PER_SECOND { Err(PeerError::Flood) } else { Ok(()) }
    }

    fn opened(&self, frame: Frame) -> Result<(), PeerError> {
        let mut shared = self.shared.borrow_mut();
        if shared.role == Role::Client {
            return Err(PeerError::ServerOpened);
        }
        let id = frame.stream;
        let known = shared.streams.get(&id).cloned();
        let state = match known {
            // Another frame of a head that has not ended; a stream is opened once.
            Some(state) if state.borrow().is_opening() => state,
            Some(_) => return Err(PeerError::StreamOrder(id)),
            None => {
                if id.is_multiple_of(2) || id <= shared.last_accepted {
                    return Err(PeerError::StreamOrder(id));
                }
                if shared.streams.len() >= MAX_STREAMS {
                    return Err(PeerError::TooManyStreams);
                }
                shared.last_accepted = id;
                let state = StreamState::shared(false);
                shared.streams.insert(id, Rc::clone(&state));
                state
            }
        };
        let head = state.borrow_mut().join(frame.payload, frame.flags).ok_or(PeerError::HeadTooLong)?;
        let Some(head) = head else { return Ok(()) };
        if frame.flags & frame::END != 0 {
            state.borrow_mut().push(Event::End);
        }
        let sender = Sender::new(self.clone(), id, Rc::clone(&state));
        let receiver = Receiver::new(self.clone(), id, state);
        shared.accepted.push_back((head, sender, receiver));
        if let Some(waiter) = shared.accept_waiter.take() {
            waiter.wake();
        }
        Ok(())
    }

    fn data(&self, frame: Frame) -> Result<(), PeerError> {
        let length = frame.payload.len() as u32;
        let end = frame.flags & frame::END != 0;
        if length == 0 && !end {
            self.control()?;
        }
        let mut shared = self.shared.borrow_mut();
        let Some(state) = shared.streams.get(&frame.stream).cloned() else {
            // The stream has ended here; its bytes still count against the connection's credit.
            shared.give_back(length);
            return Ok(());
        };
        let mut state = state.borrow_mut();
        if state.has_ended() {
            return Err(PeerError::AfterEnd(frame.stream));
        }
        if !state.take_granted(length) {
            return Err(PeerError::Overrun);
        }
        if state.moved(length) {
            shared.carries_bulk(frame.stream);
        }
        drop(shared);
        if length > 0 {
            state.push(Event::Data(frame.payload));
        }
        if end {
            state.push(Event::End);
        }
        Ok(())
    }

    fn block(&self, frame: Frame) -> Result<(), PeerError> {
        let Some(state) = self.shared.borrow().streams.get(&frame.stream).cloned() else { return Ok(()) };
        let (blocks, bytes) = state.borrow().blocks();
        if blocks >= MAX_BLOCKS || bytes >= MAX_BLOCK_BYTES {
            reset(self, frame.stream, &state, Code::FlowControl);
            return Ok(());
        }
        let mut state = state.borrow_mut();
        if state.has_ended() {
            return Err(PeerError::AfterEnd(frame.stream));
        }
        let Some(block) = state.join(frame.payload, frame.flags).ok_or(PeerError::HeadTooLong)? else {
            return Ok(());
        };
        let trailers = frame.kind == Kind::Trailers;
        state.push(if trailers { Event::Trailers(block) } else { Event::Head(block) });
        if trailers || frame.flags & frame::END != 0 {
            state.push(Event::End);
        }
        Ok(())
    }

    fn reset(&self, frame: &Frame) {
        let code = frame.payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let mut shared = self.shared.borrow_mut();
        let Some(state) = shared.streams.get(&frame.stream).cloned() else { return };
        shared.forget(frame.stream);
        // A stream that is given up before anybody has looked at it costs no task.
        let place = shared.accepted.iter().position(|(_, sender, _)| sender.is(frame.stream));
        let unseen = place.and_then(|place| shared.accepted.remove(place));
        drop(shared);
        state.borrow_mut().push(Event::Reset(Code::from_u32(code)));
        drop(unseen);
    }

    fn granted(&self, frame: &Frame) -> Result<(), PeerError> {
        let grant = frame.payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let mut shared = self.shared.borrow_mut();
        if frame.stream == 0 {
            shared.credit = shared.credit.checked_add(grant).ok_or(PeerError::CreditOverflow)?;
            shared.credit_turns.call_all();
            return Ok(());
        }
        match shared.streams.get(&frame.stream) {
            Some(state) if !state.borrow_mut().add_credit(grant) => Err(PeerError::CreditOverflow),
            _ => Ok(()),
        }
    }
}
