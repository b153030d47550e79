//! One stream: what its two halves can do.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use tulle_mesh::wire::frame::{self, Code, Kind};
use tulle_mesh::wire::{MAX_HEAD, MAX_PAYLOAD, MAX_STREAM_CREDIT, STREAM_CREDIT};

use super::connection::Connection;

/// What arrives on a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The head of the answer.
    Head(Bytes),
    /// Bytes of the body.
    Data(Bytes),
    /// Trailers.
    Trailers(Bytes),
    /// Nothing more in this direction.
    End,
    /// The peer gave the stream up.
    Reset(Code),
    /// The connection is gone.
    Lost,
}

/// Why a stream cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The connection takes no more streams; nothing was sent.
    #[error("the connection takes no more streams")]
    Unopened,
    /// The peer gave the stream up.
    #[error("the peer reset the stream: {0:?}")]
    Reset(Code),
    /// The connection is gone.
    #[error("the connection between the sidecars was lost")]
    Lost,
}

/// The part of a stream that both halves and the driver share.
pub(super) struct StreamState {
    events: VecDeque<Event>,
    receiver: Option<Waker>,
    sender: Option<Waker>,
    /// Bytes that the peer still takes.
    credit: u32,
    /// Bytes that the peer may still send.
    granted: u32,
    /// What may be under way to us; grows while we keep up.
    window: u32,
    consumed: u32,
    partial: Option<BytesMut>,
    send_ended: bool,
    receive_ended: bool,
    /// The peer has sent its end, read or not.
    peer_ended: bool,
    failed: Option<StreamError>,
}

impl StreamState {
    pub(super) fn shared(send_ended: bool) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            events: VecDeque::new(),
            receiver: None,
            sender: None,
            credit: STREAM_CREDIT,
            granted: STREAM_CREDIT,
            window: STREAM_CREDIT,
            consumed: 0,
            partial: None,
            send_ended,
            receive_ended: false,
            peer_ended: false,
            failed: None,
        }))
    }

    pub(super) fn push(&mut self, event: Event) {
        match &event {
            Event::Reset(code) => self.failed = Some(StreamError::Reset(*code)),
            Event::Lost => self.failed = Some(StreamError::Lost),
            Event::End => self.peer_ended = true,
            _ => {}
        }
        if self.failed.is_some()
            && let Some(waker) = self.sender.take()
        {
            waker.wake();
        }
        self.events.push_back(event);
        if let Some(waker) = self.receiver.take() {
            waker.wake();
        }
    }

    /// Joins the frames of a head: `None` when it is too long, `Some(None)` until it is whole.
    pub(super) fn join(&mut self, payload: &Bytes, flags: u8) -> Option<Option<Bytes>> {
        if flags & frame::MORE == 0 && self.partial.is_none() {
            return Some(Some(Bytes::copy_from_slice(payload)));
        }
        let partial = self.partial.get_or_insert_default();
        partial.extend_from_slice(payload);
        if partial.len() > MAX_HEAD {
            return None;
        }
        if flags & frame::MORE != 0 {
            return Some(None);
        }
        Some(self.partial.take().map(BytesMut::freeze))
    }

    /// Whether the peer has ended its direction.
    pub(super) fn has_ended(&self) -> bool {
        self.peer_ended
    }

    /// Heads and trailers that nobody has read yet.
    pub(super) fn blocks(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Head(_) | Event::Trailers(_))).count()
    }

    /// Whether a head has begun and not ended.
    pub(super) fn is_opening(&self) -> bool {
        self.partial.is_some()
    }

    pub(super) fn take_granted(&mut self, length: u32) -> bool {
        match self.granted.checked_sub(length) {
            Some(left) => {
                self.granted = left;
                true
            }
            None => false,
        }
    }

    /// What the peer may send in addition, now that `length` bytes have been taken: nothing until half of
    /// the window has been; then that, and as much again while `growth` lasts.
    fn grant(&mut self, length: u32, growth: &mut u32) -> u32 {
        self.consumed += length;
        if self.consumed < self.window / 2 || self.peer_ended {
            return 0;
        }
        let wider = self.window.min(MAX_STREAM_CREDIT.saturating_sub(self.window)).min(*growth);
        *growth -= wider;
        self.window += wider;
        let grant = std::mem::take(&mut self.consumed) + wider;
        self.granted = self.granted.saturating_add(grant);
        grant
    }

    /// What the window has grown by, to be given to other streams.
    fn grown(&mut self) -> u32 {
        let grown = self.window.saturating_sub(STREAM_CREDIT);
        self.window = STREAM_CREDIT;
        grown
    }

    pub(super) fn add_credit(&mut self, grant: u32) -> bool {
        let Some(credit) = self.credit.checked_add(grant) else { return false };
        self.credit = credit;
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
        true
    }

    fn finished(&self) -> bool {
        self.send_ended && self.receive_ended
    }
}

/// The half that sends. Dropped before its end, it resets the stream.
pub struct Sender {
    connection: Connection,
    id: u32,
    state: Rc<RefCell<StreamState>>,
}

/// The half that receives.
pub struct Receiver {
    connection: Connection,
    id: u32,
    state: Rc<RefCell<StreamState>>,
}

impl Sender {
    pub(super) fn new(connection: Connection, id: u32, state: Rc<RefCell<StreamState>>) -> Self {
        Self { connection, id, state }
    }

    /// Sends the head of an answer.
    pub fn head(&self, head: &[u8], end: bool) {
        self.block(Kind::Head, head, end);
    }

    /// Sends trailers, which end this direction.
    pub fn trailers(&self, block: &[u8]) {
        self.block(Kind::Trailers, block, true);
    }

    fn block(&self, kind: Kind, block: &[u8], end: bool) {
        if self.state.borrow().failed.is_some() {
            return;
        }
        let mut shared = self.connection.shared.borrow_mut();
        frame::encode_block(&mut shared.out, kind, if end { frame::END } else { 0 }, self.id, block);
        shared.wake_driver();
        drop(shared);
        if end {
            self.ended();
        }
    }

    /// Sends bytes; waits for credit.
    ///
    /// # Errors
    /// [`StreamError`] when the peer or the connection has given up.
    pub async fn data(&self, mut bytes: Bytes) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let room = poll_fn(|cx| self.poll_credit(cx, bytes.len())).await?;
            let piece = bytes.split_to(room);
            let mut shared = self.connection.shared.borrow_mut();
            frame::encode(&mut shared.out, Kind::Data, 0, self.id, &piece);
            shared.wake_driver();
        }
        Ok(())
    }

    /// Ends this direction, unless it was opened as ended or has been.
    pub fn end(&self) {
        if self.state.borrow().send_ended {
            return;
        }
        let mut shared = self.connection.shared.borrow_mut();
        frame::encode(&mut shared.out, Kind::Data, frame::END, self.id, &[]);
        shared.wake_driver();
        drop(shared);
        self.ended();
    }

    /// Resolves when the peer has given the stream up, or the connection is gone.
    pub async fn gone(&self) {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.failed.is_some() {
                return Poll::Ready(());
            }
            state.sender = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Gives the stream up, with a reason.
    pub fn reset(&self, code: Code) {
        reset(&self.connection, self.id, &self.state, code);
    }

    fn ended(&self) {
        let mut state = self.state.borrow_mut();
        state.send_ended = true;
        if state.finished() {
            self.connection.shared.borrow_mut().forget(self.id);
        }
    }

    fn poll_credit(&self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, StreamError>> {
        let mut state = self.state.borrow_mut();
        if let Some(error) = state.failed {
            return Poll::Ready(Err(error));
        }
        let mut shared = self.connection.shared.borrow_mut();
        let room = wanted.min(MAX_PAYLOAD).min(state.credit as usize).min(shared.credit as usize);
        if room > 0 {
            state.credit -= room as u32;
            shared.credit -= room as u32;
            return Poll::Ready(Ok(room));
        }
        if shared.credit == 0 {
            shared.credit_waiters.push(cx.waker().clone());
        }
        state.sender = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let ended = { self.state.borrow().send_ended };
        if !ended {
            self.reset(Code::Cancel);
        }
    }
}

pub(super) fn reset(connection: &Connection, id: u32, state: &Rc<RefCell<StreamState>>, code: Code) {
    {
        let mut state = state.borrow_mut();
        state.send_ended = true;
        if state.failed.is_some() {
            return;
        }
        state.push(Event::Reset(code));
    }
    let mut shared = connection.shared.borrow_mut();
    if shared.forget(id) && !shared.closed {
        frame::encode(&mut shared.out, Kind::Reset, 0, id, &(code as u32).to_be_bytes());
        shared.wake_driver();
    }
}

impl Receiver {
    pub(super) fn new(connection: Connection, id: u32, state: Rc<RefCell<StreamState>>) -> Self {
        Self { connection, id, state }
    }

    /// The next event; after [`Event::End`], [`Event::Reset`] or [`Event::Lost`] there is none.
    pub async fn next(&mut self) -> Event {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Takes the end, if it has come with what was received last.
    pub fn take_end(&mut self) -> bool {
        let mut state = self.state.borrow_mut();
        if state.events.front() != Some(&Event::End) {
            return false;
        }
        state.events.pop_front();
        state.receive_ended = true;
        if state.finished() {
            drop(state);
            self.connection.shared.borrow_mut().forget(self.id);
        }
        true
    }

    /// As [`Self::next`], to be polled.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let mut state = self.state.borrow_mut();
        let Some(event) = state.events.pop_front() else {
            if let Some(error) = state.failed {
                return Poll::Ready(match error {
                    StreamError::Reset(code) => Event::Reset(code),
                    _ => Event::Lost,
                });
            }
            if state.receive_ended {
                return Poll::Ready(Event::End);
            }
            state.receiver = Some(cx.waker().clone());
            return Poll::Pending;
        };
        match &event {
            Event::Data(bytes) => {
                let length = bytes.len() as u32;
                let mut shared = self.connection.shared.borrow_mut();
                let grant = state.grant(length, &mut shared.growth);
                drop(state);
                if grant > 0 && shared.streams.contains_key(&self.id) {
                    frame::encode(&mut shared.out, Kind::Credit, 0, self.id, &grant.to_be_bytes());
                    shared.wake_driver();
                }
                shared.give_back(length);
            }
            Event::End => {
                state.receive_ended = true;
                if state.finished() {
                    drop(state);
                    self.connection.shared.borrow_mut().forget(self.id);
                }
            }
            _ => {}
        }
        Poll::Ready(event)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let (open, unread, grown) = {
            let mut state = self.state.borrow_mut();
            // The end that nobody has read yet is an end: no reset for it.
            if state.events.contains(&Event::End) {
                state.receive_ended = true;
            }
            let unread: usize = state
                .events
                .drain(..)
                .map(|e| if let Event::Data(bytes) = e { bytes.len() } else { 0 })
                .sum();
            (!state.receive_ended && state.failed.is_none(), unread, state.grown())
        };
        let mut shared = self.connection.shared.borrow_mut();
        shared.growth += grown;
        shared.give_back(unread as u32);
        if self.state.borrow().finished() {
            shared.forget(self.id);
        }
        drop(shared);
        if open {
            reset(&self.connection, self.id, &self.state, Code::Cancel);
        }
    }
}
