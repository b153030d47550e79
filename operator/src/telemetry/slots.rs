//! Slots of time, as bytes: five thousand series with some hundred slots each would not fit into memory as numbers.
//!
//! A slot that has ended is written once and read when somebody asks, or when it is added to a longer slot. All numbers
//! are varints, numbers that are zero are left out, and the histogram is the counts of its buckets one after the other.
//! At 20 requests a second a slot of ten seconds has about 70 bytes, one of a minute 75, and one of five minutes 105.

use std::collections::BTreeMap;
use std::sync::Arc;

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

/// Up to eight numbers: which of them are not zero, and these.
fn put_some(bytes: &mut Vec<u8>, numbers: &[u64]) {
    let mask = numbers.iter().rev().fold(0_u8, |mask, number| (mask << 1) | u8::from(*number > 0));
    bytes.push(mask);
    numbers.iter().filter(|number| **number > 0).for_each(|number| put(bytes, *number));
}

fn take_some<const N: usize>(bytes: &mut &[u8]) -> Option<[u64; N]> {
    let (mask, rest) = bytes.split_first()?;
    *bytes = rest;
    let mut numbers = [0; N];
    for (bit, number) in numbers.iter_mut().enumerate() {
        if (mask >> bit) & 1 == 1 {
            *number = take(bytes)?;
        }
    }
    Some(numbers)
}

/// Counts as bytes.
pub(super) fn encode(counts: &Counts, reasons: &mut Reasons) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256);
    put_some(&mut bytes, &counts.classes);
    let sum = counts.latency.sum_micros();
    put_some(&mut bytes, &[sum, counts.bytes_up, counts.bytes_down, counts.connections, counts.retries]);
    put(&mut bytes, counts.reasons.len() as u64);
    for (name, count) in &counts.reasons {
        let number = reasons.number(name);
        put(&mut bytes, number);
        put(&mut bytes, *count);
    }
    let mut next = 0;
    for (bucket, count) in counts.latency.buckets() {
        // A zero, and how many there are: no bucket that is listed is empty.
        if bucket > next {
            put(&mut bytes, 0);
            put(&mut bytes, (bucket - next) as u64);
        }
        put(&mut bytes, count);
        next = bucket + 1;
    }
    bytes
}

/// Adds what [`encode`] has written to a sum. `None`: the bytes are not of that kind, which cannot happen.
pub(super) fn add_to(sum: &mut Counts, mut bytes: &[u8], reasons: &Reasons) -> Option<()> {
    let bytes = &mut bytes;
    for (class, count) in sum.classes.iter_mut().zip(take_some::<8>(bytes)?) {
        *class = class.saturating_add(count);
    }
    let [micros, bytes_up, bytes_down, connections, retries] = take_some::<5>(bytes)?;
    sum.latency.add_sum(micros);
    sum.bytes_up = sum.bytes_up.saturating_add(bytes_up);
    sum.bytes_down = sum.bytes_down.saturating_add(bytes_down);
    sum.connections = sum.connections.saturating_add(connections);
    sum.retries = sum.retries.saturating_add(retries);
    for _ in 0..take(bytes)? {
        let (number, count) = (take(bytes)?, take(bytes)?);
        sum.add_reason(reasons.name(number)?, count);
    }
    let mut bucket = 0_usize;
    while !bytes.is_empty() {
        match take(bytes)? {
            0 => bucket = bucket.saturating_add(usize::try_from(take(bytes)?).ok()?),
            count => {
                sum.latency.add(bucket, count);
                bucket = bucket.saturating_add(1);
            }
        }
    }
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

    /// Bytes on the heap.
    pub(super) fn heap(&self) -> usize {
        self.bytes.capacity()
    }

    /// The slots: their starts, and their counts as [`encode`] has written them.
    pub(super) fn iter(&self, step: i64) -> Records<'_> {
        Records { rest: &self.bytes, start: None, first: self.first, step }
    }

    /// Adds counts to the slot that starts at `start`.
    pub(super) fn add(&mut self, step: i64, start: i64, counts: &Counts, reasons: &mut Reasons) {
        if self.is_empty() || start > self.last {
            self.push(step, start, &encode(counts, reasons));
            return;
        }
        // A slot between others, or one that is there already: rare.
        self.add_all(step, &[(start, counts.clone())], reasons);
    }

    /// Adds counts to several slots, wherever they start.
    pub(super) fn add_all(&mut self, step: i64, all: &[(i64, Counts)], reasons: &mut Reasons) {
        let mut slots: BTreeMap<i64, Counts> = BTreeMap::new();
        for (start, body) in self.iter(step) {
            let _ = add_to(slots.entry(start).or_default(), body, reasons);
        }
        for (start, counts) in all {
            slots.entry(*start).or_default().merge(counts);
        }
        *self = Self::default();
        for (start, counts) in &slots {
            self.push(step, *start, &encode(counts, reasons));
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
