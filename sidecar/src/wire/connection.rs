//! The state of a connection that its streams and its driver share.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use tulle_mesh::wire::frame::{self, Code, Frame, Kind};
use tulle_mesh::wire::{CONNECTION_CREDIT, CONNECTION_GROWTH, MAX_HEAD, MAX_STREAMS};

use super::stream::{Event, Receiver, Sender, StreamError, StreamState, reset};

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

pub(super) struct Shared {
    pub(super) role: Role,
    /// Frames that wait for the driver.
    pub(super) out: BytesMut,
    pub(super) driver: Option<Waker>,
    pub(super) streams: HashMap<u32, Rc<RefCell<StreamState>>>,
    next_stream: u32,
    last_accepted: u32,
    /// Bytes of DATA that the peer still takes on the whole connection.
    pub(super) credit: u32,
    pub(super) credit_waiters: Vec<Waker>,
    /// What is left to widen the windows of streams with.
    pub(super) growth: u32,
    /// Bytes of DATA that were consumed here and not yet granted again.
    pub(super) consumed: u32,
    accepted: VecDeque<(Bytes, Sender, Receiver)>,
    accept_waiter: Option<Waker>,
    /// No new streams: the peer said so, or the connection is too old.
    pub(super) draining: bool,
    pub(super) closed: bool,
    /// Frames in this second that cost the peer nothing and us something.
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

impl Connection {
    /// A connection whose driver has not started.
    pub fn new(role: Role) -> Self {
        Self {
            shared: Rc::new(RefCell::new(Shared {
                role,
                out: BytesMut::new(),
                driver: None,
                streams: HashMap::new(),
                next_stream: 1,
                last_accepted: 0,
                credit: CONNECTION_CREDIT,
                credit_waiters: Vec::new(),
                growth: CONNECTION_GROWTH,
                consumed: 0,
                accepted: VecDeque::new(),
                accept_waiter: None,
                draining: false,
                closed: false,
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
        if shared.draining || shared.closed || shared.streams.len() >= MAX_STREAMS {
            return Err(StreamError::Unopened);
        }
        let id = shared.next_stream;
        shared.next_stream = id.checked_add(2).ok_or(StreamError::Unopened)?;
        let state = StreamState::shared(end);
        shared.streams.insert(id, Rc::clone(&state));
        frame::encode_block(&mut shared.out, Kind::Open, if end { frame::END } else { 0 }, id, head);
        shared.wake_driver();
        drop(shared);
        Ok((Sender::new(self.clone(), id, Rc::clone(&state)), Receiver::new(self.clone(), id, state)))
    }

    /// The next stream that the peer opened, with its head; `None` when the connection has ended.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Option<(Bytes, Sender, Receiver)>> {
        let mut shared = self.shared.borrow_mut();
        if let Some(stream) = shared.accepted.pop_front() {
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
        let shared = self.shared.borrow();
        !shared.draining && !shared.closed && shared.streams.len() < MAX_STREAMS
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.borrow().closed
    }

    /// Lets running streams end and opens no more; a server tells its peer.
    pub fn drain(&self) {
        let mut shared = self.shared.borrow_mut();
        if !shared.draining {
            shared.draining = true;
            frame::encode(&mut shared.out, Kind::GoAway, 0, 0, &[]);
        }
        shared.wake_driver();
    }
}

impl Shared {
    pub(super) fn wake_driver(&mut self) {
        if let Some(waker) = self.driver.take() {
            waker.wake();
        }
    }

    /// A stream that has ended; whether it was still here. A driver that only waits for its last stream is
    /// told.
    pub(super) fn forget(&mut self, id: u32) -> bool {
        let was_here = self.streams.remove(&id).is_some();
        if self.draining {
            self.wake_driver();
        }
        was_here
    }

    /// Ends everything; streams see that their connection is gone.
    pub(super) fn close(&mut self) {
        self.closed = true;
        for (_, state) in self.streams.drain() {
            state.borrow_mut().push(Event::Lost);
        }
        for waiter in self.credit_waiters.drain(..) {
            waiter.wake();
        }
        if let Some(waiter) = self.accept_waiter.take() {
            waiter.wake();
        }
    }

    /// Gives bytes back that a stream has consumed, once they are worth a frame.
    pub(super) fn give_back(&mut self, bytes: u32) {
        self.consumed = self.consumed.saturating_add(bytes);
        if self.consumed >= CONNECTION_CREDIT / 4 {
            let grant = std::mem::take(&mut self.consumed);
            frame::encode(&mut self.out, Kind::Credit, 0, 0, &grant.to_be_bytes());
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
            Kind::Head | Kind::Trailers => self.block(&frame),
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
                if frame.flags & frame::ACK == 0 {
                    let mut shared = self.shared.borrow_mut();
                    frame::encode(&mut shared.out, Kind::Ping, frame::ACK, 0, &frame.payload);
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
        let head = state.borrow_mut().join(&frame.payload, frame.flags).ok_or(PeerError::HeadTooLong)?;
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
        drop(shared);
        let mut state = state.borrow_mut();
        if state.has_ended() {
            return Err(PeerError::AfterEnd(frame.stream));
        }
        if !state.take_granted(length) {
            return Err(PeerError::Overrun);
        }
        if length > 0 {
            state.push(Event::Data(own(frame.payload)));
        }
        if end {
            state.push(Event::End);
        }
        Ok(())
    }

    fn block(&self, frame: &Frame) -> Result<(), PeerError> {
        let Some(state) = self.shared.borrow().streams.get(&frame.stream).cloned() else { return Ok(()) };
        if state.borrow().blocks() >= MAX_BLOCKS {
            reset(self, frame.stream, &state, Code::FlowControl);
            return Ok(());
        }
        let mut state = state.borrow_mut();
        if state.has_ended() {
            return Err(PeerError::AfterEnd(frame.stream));
        }
        let Some(block) = state.join(&frame.payload, frame.flags).ok_or(PeerError::HeadTooLong)? else {
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
        let state = self.shared.borrow_mut().streams.remove(&frame.stream);
        if let Some(state) = state {
            state.borrow_mut().push(Event::Reset(Code::from_u32(code)));
        }
    }

    fn granted(&self, frame: &Frame) -> Result<(), PeerError> {
        let grant = frame.payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let mut shared = self.shared.borrow_mut();
        if frame.stream == 0 {
            shared.credit = shared.credit.checked_add(grant).ok_or(PeerError::CreditOverflow)?;
            for waiter in shared.credit_waiters.drain(..) {
                waiter.wake();
            }
            return Ok(());
        }
        match shared.streams.get(&frame.stream) {
            Some(state) if !state.borrow_mut().add_credit(grant) => Err(PeerError::CreditOverflow),
            _ => Ok(()),
        }
    }
}

/// A small payload is copied so that it does not keep the whole read buffer alive.
fn own(payload: Bytes) -> Bytes {
    if payload.len() < 2048 { Bytes::copy_from_slice(&payload) } else { payload }
}
