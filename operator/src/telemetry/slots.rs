//! Slots of time, as bytes: five thousand series with some hundred slots each would not fit into memory as numbers.
//!
//! A slot that has ended is written once, and again only when counts for it come late. It is read when somebody asks, or
//! when it is added to a longer slot. Numbers are varints, and those that are zero are left out. Of the histogram each bucket is written as its difference to the one
//! before, in bits: neighbours are alike, so that this takes about half of what varints would. At 20 requests a second a
//! slot has 40 to 60 bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use tulle_mesh::histogram::Histogram;

use super::counts::{Counts, OTHER};

/// Names of reasons that are told apart in a history.
const MAX_NAMES: usize = 255;

/// Names of reasons, by number. The first is [`OTHER`].
#[derive(Clone, Debug)]
pub(super) struct Reasons {
    names: Vec<Arc<str>>,
}

impl Default for Reasons {
    fn default() -> Self {
        Self { names: vec![OTHER.into()] }
    }
}

impl Reasons {
    fn number(&mut self, name: &Arc<str>) -> u64 {
        if let Some(known) = self.names.iter().position(|known| known == name) {
            return known as u64;
        }
        if self.names.len() >= MAX_NAMES {
            return 0;
        }
        self.names.push(Arc::clone(name));
        self.names.len() as u64 - 1
    }

    fn name(&self, number: u64) -> Option<&Arc<str>> {
        self.names.get(usize::try_from(number).ok()?).or_else(|| self.names.first())
    }
}

fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
thread_local! {
    /// Slots that this thread has encoded: the work that tests count.
    pub(super) static ENCODED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Beside the mask of the totals: there are reasons.
const HAS_REASONS: u8 = 1 << 6;
/// The same: each request has a latency, and the class of 2xx is what the other classes leave of their number.
const SUCCESS_LEFT_OUT: u8 = 1 << 7;

/// Up to eight numbers: which of them are not zero, beside `flags`, and these.
fn put_some(bytes: &mut Vec<u8>, flags: u8, numbers: &[u64]) {
    let mask = numbers.iter().rev().fold(0_u8, |mask, number| (mask << 1) | u8::from(*number > 0));
    bytes.push(mask | flags);
    numbers.iter().filter(|number| **number > 0).for_each(|number| put(bytes, *number));
}

/// The mask with its flags, and the numbers.
fn take_some<const N: usize>(bytes: &mut &[u8]) -> Option<(u8, [u64; N])> {
    let (mask, rest) = bytes.split_first()?;
    *bytes = rest;
    let mut numbers = [0; N];
    for (bit, number) in numbers.iter_mut().enumerate() {
        if (mask >> bit) & 1 == 1 {
            *number = take(bytes)?;
        }
    }
    Some((*mask, numbers))
}

/// Writes numbers of some bits.
struct BitWriter<'a> {
    bytes: &'a mut Vec<u8>,
    /// The last `count` bits are not in a byte yet.
    held: u64,
    count: u32,
}

impl BitWriter<'_> {
    /// Writes a number of at most 32 bits.
    fn put(&mut self, value: u64, bits: u32) {
        self.held = (self.held << bits) | value;
        self.count += bits;
        while self.count >= 8 {
            self.count -= 8;
            self.bytes.push((self.held >> self.count) as u8);
        }
    }

    fn end(self) {
        if self.count > 0 {
            self.bytes.push((self.held << (8 - self.count)) as u8);
        }
    }
}

/// Reads what a [`BitWriter`] has written.
struct BitReader<'a> {
    bytes: &'a [u8],
    /// The first `count` bits are the next ones, and those after them are zero.
    held: u64,
    count: u32,
}

impl BitReader<'_> {
    fn fill(&mut self) {
        while self.count <= 56
            && let Some((byte, rest)) = self.bytes.split_first()
        {
            self.held |= u64::from(*byte) << (56 - self.count);
            self.count += 8;
            self.bytes = rest;
        }
    }

    /// The next at most 32 bits.
    fn take(&mut self, bits: u32) -> Option<u64> {
        if bits == 0 {
            return Some(0);
        }
        self.fill();
        let value = self.held >> (64 - bits);
        self.count = self.count.checked_sub(bits)?;
        self.held <<= bits;
        Some(value)
    }

    /// How many bits before the next one are zero.
    fn zeros(&mut self) -> u32 {
        self.fill();
        self.held.leading_zeros()
    }
}

/// A number whose exponent would have so many bits is written whole.
const LONG: u32 = 24;

/// Codes the counts of neighbouring buckets: each as its difference to the one before, by an exponential Golomb code. Its
/// order follows the differences so far: they are large where there are many requests.
#[derive(Default)]
struct Neighbours {
    last: u64,
    /// A mean of differences, in which the last ones count most.
    mean: u64,
}

impl Neighbours {
    fn order(&self) -> u32 {
        self.mean.checked_ilog2().unwrap_or(0).min(32)
    }

    fn passed(&mut self, count: u64, difference: u64) {
        self.last = count;
        // Half of the sum, which itself may be too large.
        self.mean = (self.mean >> 1) + (difference >> 1) + (self.mean & difference & 1);
    }

    fn put(&mut self, bits: &mut BitWriter<'_>, count: u64) {
        // Small differences of either sign become small numbers. Wraps around, so that every count comes back.
        let signed = count.wrapping_sub(self.last) as i64;
        let difference = ((signed << 1) ^ (signed >> 63)) as u64;
        let order = self.order();
        let quotient = (difference >> order).saturating_add(1);
        let exponent = quotient.ilog2();
        if exponent < LONG {
            bits.put(1, exponent + 1);
            bits.put(quotient & ((1_u64 << exponent) - 1), exponent);
            bits.put(difference & ((1_u64 << order) - 1), order);
        } else {
            bits.put(0, LONG);
            bits.put(difference >> 32, 32);
            bits.put(difference & 0xffff_ffff, 32);
        }
        self.passed(count, difference);
    }

    fn take(&mut self, bits: &mut BitReader<'_>) -> Option<u64> {
        let exponent = bits.zeros();
        let difference = if exponent < LONG {
            bits.take(exponent + 1)?;
            let quotient = (1_u64 << exponent) | bits.take(exponent)?;
            let order = self.order();
            ((quotient - 1) << order) | bits.take(order)?
        } else {
            bits.take(LONG)?;
            (bits.take(32)? << 32) | bits.take(32)?
        };
        let signed = (difference >> 1) as i64 ^ -((difference & 1) as i64);
        let count = self.last.wrapping_add(signed as u64);
        self.passed(count, difference);
        Some(count)
    }
}

/// The buckets from the first to the last that is not empty; nothing, if all are.
fn put_buckets(bytes: &mut Vec<u8>, latency: &Histogram) {
    let Some((first, _)) = latency.buckets().next() else { return };
    let last = latency.buckets().last().map_or(first, |(bucket, _)| bucket);
    put(bytes, first as u64);
    put(bytes, (last - first) as u64);
    let mut bits = BitWriter { bytes, held: 0, count: 0 };
    let (mut neighbours, mut next) = (Neighbours::default(), first);
    for (bucket, count) in latency.buckets() {
        (next..bucket).for_each(|_| neighbours.put(&mut bits, 0));
        neighbours.put(&mut bits, count);
        next = bucket + 1;
    }
    bits.end();
}

/// Adds buckets to a histogram. Returns how many latencies they have.
fn take_buckets(bytes: &mut &[u8], latency: &mut Histogram) -> Option<u64> {
    if bytes.is_empty() {
        return Some(0);
    }
    let first = usize::try_from(take(bytes)?).ok()?;
    let last = first.checked_add(usize::try_from(take(bytes)?).ok()?)?;
    let mut bits = BitReader { bytes, held: 0, count: 0 };
    let (mut neighbours, mut all) = (Neighbours::default(), 0_u64);
    for bucket in first..=last {
        let count = neighbours.take(&mut bits)?;
        // Of an empty bucket room would be made.
        if count > 0 {
            latency.add(bucket, count);
            all = all.saturating_add(count);
        }
    }
    Some(all)
}

/// Counts as bytes.
pub(super) fn encode(counts: &Counts, reasons: &mut Reasons) -> Vec<u8> {
    #[cfg(test)]
    ENCODED.with(|encoded| encoded.set(encoded.get() + 1));
    let mut bytes = Vec::with_capacity(256);
    let (latency, mut classes, mut flags) = (&counts.latency, counts.classes, 0);
    if counts.requests() == latency.count() {
        flags |= SUCCESS_LEFT_OUT;
        let [_, success, ..] = &mut classes;
        *success = 0;
    }
    if !counts.reasons.is_empty() {
        flags |= HAS_REASONS;
    }
    let sum = latency.sum_micros();
    let Counts { bytes_up, bytes_down, connections, retries, ejections, .. } = *counts;
    let totals = [sum, bytes_up, bytes_down, connections, retries, ejections];
    put_some(&mut bytes, flags, &totals);
    put_some(&mut bytes, 0, &classes);
    if !counts.reasons.is_empty() {
        put(&mut bytes, counts.reasons.len() as u64);
    }
    for (name, count) in &counts.reasons {
        let number = reasons.number(name);
        put(&mut bytes, number);
        put(&mut bytes, *count);
    }
    put_buckets(&mut bytes, latency);
    bytes
}

/// Adds what [`encode`] has written to a sum. `None`: the bytes are not of that kind, which cannot happen.
pub(super) fn add_to(sum: &mut Counts, mut bytes: &[u8], reasons: &Reasons) -> Option<()> {
    let bytes = &mut bytes;
    let (flags, [micros, bytes_up, bytes_down, connections, retries, ejections]) = take_some::<6>(bytes)?;
    let (_, mut classes) = take_some::<8>(bytes)?;
    if flags & HAS_REASONS != 0 {
        for _ in 0..take(bytes)? {
            let (number, count) = (take(bytes)?, take(bytes)?);
            sum.add_reason(reasons.name(number)?, count);
        }
    }
    let requests = take_buckets(bytes, &mut sum.latency)?;
    if flags & SUCCESS_LEFT_OUT != 0 {
        let others = classes.iter().fold(0, |sum: u64, count| sum.saturating_add(*count));
        let [_, success, ..] = &mut classes;
        *success = requests.saturating_sub(others);
    }
    for (class, count) in sum.classes.iter_mut().zip(classes) {
        *class = class.saturating_add(count);
    }
    sum.latency.add_sum(micros);
    sum.bytes_up = sum.bytes_up.saturating_add(bytes_up);
    sum.bytes_down = sum.bytes_down.saturating_add(bytes_down);
    sum.connections = sum.connections.saturating_add(connections);
    sum.retries = sum.retries.saturating_add(retries);
    sum.ejections = sum.ejections.saturating_add(ejections);
    Some(())
}

/// Slots of one length, ascending; those without counts are not there.
#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    /// Of each slot: steps from the one before, the length of its counts, its counts.
    bytes: Vec<u8>,
    /// When the first slot starts. Its own number of steps is not used.
    first: i64,
    /// When the last slot starts.
    last: i64,
}

impl Log {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// When the last slot starts. `None`: there is none.
    pub(super) fn last_start(&self) -> Option<i64> {
        (!self.is_empty()).then_some(self.last)
    }

    /// Bytes on the heap.
    pub(super) fn heap(&self) -> usize {
        self.bytes.capacity()
    }

    /// The slots: their starts, and their counts as [`encode`] has written them.
    pub(super) fn iter(&self, step: i64) -> Records<'_> {
        Records { rest: &self.bytes, start: None, first: self.first, step }
    }

    /// The slots that start at or after a time.
    pub(super) fn since(&self, step: i64, from: i64) -> impl Iterator<Item = (i64, &[u8])> {
        // Most logs of longer slots have none, and need not be read to know it.
        let rest: &[u8] = if self.last < from { &[] } else { &self.bytes };
        Records { rest, start: None, first: self.first, step }.filter(move |(start, _)| *start >= from)
    }

    /// Adds counts to the slot that starts at `start`.
    pub(super) fn add(&mut self, step: i64, start: i64, counts: &Counts, reasons: &mut Reasons) {
        if self.is_empty() || start > self.last {
            self.push(step, start, &encode(counts, reasons));
            return;
        }
        // A slot between others, or one that is there already: rare.
        self.add_all(step, &BTreeMap::from([(start, counts.clone())]), reasons);
    }

    /// Adds counts to several slots, wherever they start.
    pub(super) fn add_all(&mut self, step: i64, all: &BTreeMap<i64, Counts>, reasons: &mut Reasons) {
        self.change(step, all, reasons, |body, counts, reasons| {
            let mut sum = Counts::default();
            let _ = add_to(&mut sum, body, reasons);
            sum.merge(counts);
            encode(&sum, reasons)
        });
    }

    /// Makes counts those of several slots, whatever was in them.
    pub(super) fn set_all(&mut self, step: i64, all: &BTreeMap<i64, Counts>, reasons: &mut Reasons) {
        self.change(step, all, reasons, |_, counts, reasons| encode(counts, reasons));
    }

    /// Changes several slots: `known` writes one that is there already. Only these are decoded and encoded. Of the others,
    /// those before the first change stay where they are, and the bytes of those after it are moved.
    fn change(
        &mut self,
        step: i64,
        all: &BTreeMap<i64, Counts>,
        reasons: &mut Reasons,
        known: impl Fn(&[u8], &Counts, &mut Reasons) -> Vec<u8>,
    ) {
        let Some((&from, _)) = all.first_key_value() else { return };
        let (kept, before) = self.place(step, from);
        let (first, moved) = (self.first, self.bytes.split_off(kept));
        // Nothing before: the first slot that is pushed becomes the first one.
        self.last = before.unwrap_or(first);
        let mut changes = all.iter().peekable();
        for (start, body) in (Records { rest: &moved, start: before, first, step }) {
            while let Some((new, counts)) = changes.next_if(|(new, _)| **new < start) {
                self.push(step, *new, &encode(counts, reasons));
            }
            match changes.next_if(|(new, _)| **new == start) {
                Some((_, counts)) => self.push(step, start, &known(body, counts, reasons)),
                None => self.push(step, start, body),
            }
        }
        for (new, counts) in changes {
            self.push(step, *new, &encode(counts, reasons));
        }
        self.bytes.shrink_to_fit();
    }

    /// How many bytes the slots that start before a time have, and when the last of them starts.
    fn place(&self, step: i64, time: i64) -> (usize, Option<i64>) {
        let whole = self.bytes.len();
        if self.last < time && whole > 0 {
            return (whole, Some(self.last));
        }
        let (mut records, mut last) = (self.iter(step), None);
        loop {
            let before = whole - records.rest.len();
            match records.next() {
                Some((start, _)) if start < time => last = Some(start),
                Some(_) => return (before, last),
                None => return (whole, last),
            }
        }
    }

    /// Removes the slots that start at or after `from` and before `until`.
    pub(super) fn remove(&mut self, step: i64, from: i64, until: i64) {
        if self.is_empty() || self.last < from || self.first >= until {
            return;
        }
        let old = std::mem::take(self);
        for (start, body) in old.iter(step).filter(|(start, _)| !(from..until).contains(start)) {
            self.push(step, start, body);
        }
    }

    fn push(&mut self, step: i64, start: i64, body: &[u8]) {
        if self.is_empty() {
            (self.first, self.last) = (start, start);
        }
        let mut head = Vec::with_capacity(8);
        put(&mut head, u64::try_from((start - self.last) / step).unwrap_or(0));
        put(&mut head, body.len() as u64);
        // Exactly: twice as much as needed would be half of the operator's memory.
        self.bytes.reserve_exact(head.len() + body.len());
        self.bytes.extend_from_slice(&head);
        self.bytes.extend_from_slice(body);
        self.last = start;
    }

    /// Removes the slots that start before `limit`, and gives each to `each`.
    pub(super) fn drain_before(&mut self, step: i64, limit: i64, mut each: impl FnMut(i64, &[u8])) {
        let whole = self.bytes.len();
        let mut records = self.iter(step);
        let (removed, first) = loop {
            let before = whole - records.rest.len();
            match records.next() {
                Some((start, body)) if start < limit => each(start, body),
                Some((start, _)) => break (before, Some(start)),
                None => break (whole, None),
            }
        };
        match first {
            _ if removed == 0 => {}
            Some(first) => {
                self.bytes.drain(..removed);
                self.bytes.shrink_to_fit();
                self.first = first;
            }
            None => *self = Self::default(),
        }
    }
}

/// The slots of a [`Log`].
pub(super) struct Records<'a> {
    rest: &'a [u8],
    start: Option<i64>,
    first: i64,
    step: i64,
}

impl<'a> Iterator for Records<'a> {
    type Item = (i64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let steps = i64::try_from(take(&mut self.rest)?).ok()?;
        let length = usize::try_from(take(&mut self.rest)?).ok()?;
        let (body, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        let start = self.start.map_or(self.first, |start| start + steps * self.step);
        self.start = Some(start);
        Some((start, body))
    }
}
