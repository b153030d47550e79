//! Trace context in the headers of a request: W3C Trace Context (level 2) and B3, and whether a request is recorded.
//!
//! In: header lines. Out: what they say, whether a span is made of the request, and the lines that name that span to
//! whoever is called. The rules:
//!
//! - What a parent has decided holds. Only a request without one, or whose parent has left the decision open (B3), is
//!   sampled here, by the last seven bytes of its trace id: two sidecars with the same share decide alike about one trace.
//! - A request that is not recorded keeps its headers as they are, and gets none. Nothing here ever writes "not sampled",
//!   which would disarm a tracer in the application.
//! - The form that came in goes out.

#[cfg(test)]
mod tests;

/// The id of a trace.
pub type TraceId = [u8; 16];
/// The id of a span.
pub type SpanId = [u8; 8];

/// Trace ids by their last seven bytes.
const ALL_IDS: u64 = 1 << 56;
/// Length of a `traceparent` of version 00.
const TRACEPARENT: usize = 55;
const SAMPLED: u8 = 1;
const RANDOM: u8 = 2;

/// How a trace context is written in headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `traceparent` and `tracestate`.
    W3c,
    /// `b3`.
    B3Single,
    /// `X-B3-TraceId` and others.
    B3Multi,
}

/// What a request says of its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace, and the span that has sent the request; `None`: B3 carries nothing but a decision.
    pub ids: Option<(TraceId, SpanId)>,
    /// Whether the parent is recorded; `None`: it leaves that open, as B3 may.
    pub sampled: Option<bool>,
    /// B3: recorded whatever samplers say.
    pub debug: bool,
    /// W3C: the last seven bytes of the trace id are random.
    pub random: bool,
    /// B3: the trace id was written with 64 bits.
    pub short: bool,
    /// How it was written.
    pub form: Form,
}

/// A header that may come once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Line<'a> {
    #[default]
    Absent,
    One(&'a [u8]),
    Repeated,
}

impl<'a> Line<'a> {
    fn see(&mut self, value: &'a [u8]) {
        *self = if *self == Self::Absent { Self::One(value) } else { Self::Repeated };
    }
}

/// The header lines of a request that concern its trace. Looks at each line of a head once, and keeps references.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lines<'a> {
    traceparent: Line<'a>,
    b3: Line<'a>,
    trace_id: Line<'a>,
    span_id: Line<'a>,
    sampled: Line<'a>,
    flags: Line<'a>,
}

impl<'a> Lines<'a> {
    /// Those among these lines.
    pub fn of(headers: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut lines = Self::default();
        for (name, value) in headers {
            if let Some(line) = lines.named(name) {
                line.see(value);
            }
        }
        lines
    }

    /// By the length first: most names are of another one.
    fn named(&mut self, name: &[u8]) -> Option<&mut Line<'a>> {
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        match name.len() {
            2 if is("b3") => Some(&mut self.b3),
            10 if is("x-b3-flags") => Some(&mut self.flags),
            11 if is("traceparent") => Some(&mut self.traceparent),
            11 if is("x-b3-spanid") => Some(&mut self.span_id),
            12 if is("x-b3-traceid") => Some(&mut self.trace_id),
            12 if is("x-b3-sampled") => Some(&mut self.sampled),
            _ => None,
        }
    }

    /// What they say; `None`: nothing that is valid. W3C goes before B3, and `b3` before the lines that it replaces.
    pub fn context(&self) -> Option<TraceContext> {
        if let Line::One(value) = self.traceparent
            && let Some(context) = parse_traceparent(value)
        {
            return Some(context);
        }
        if let Line::One(value) = self.b3
            && let Some(context) = parse_b3(value)
        {
            return Some(context);
        }
        self.b3_multi()
    }

    fn b3_multi(&self) -> Option<TraceContext> {
        let debug = self.flags == Line::One(b"1");
        let sampled = match self.sampled {
            _ if debug => Some(true),
            Line::Absent => None,
            // Tracers that are older than the specification write words.
            Line::One(b"1" | b"true") => Some(true),
            Line::One(b"0" | b"false") => Some(false),
            Line::One(_) | Line::Repeated => return None,
        };
        let (ids, short) = match (self.trace_id, self.span_id) {
            (Line::Absent, Line::Absent) => (None, false),
            (Line::One(trace), Line::One(span)) => {
                let (trace_id, short) = b3_trace_id(trace)?;
                (Some((trace_id, id(span)?)), short)
            }
            _ => return None,
        };
        if ids.is_none() && sampled.is_none() {
            return None;
        }
        Some(TraceContext { ids, sampled, debug, random: false, short, form: Form::B3Multi })
    }
}

/// Reads a `traceparent`; `None`: it is invalid. Of a later version than 00 what 00 has is read.
pub fn parse_traceparent(value: &[u8]) -> Option<TraceContext> {
    let (known, more) = value.split_at_checked(TRACEPARENT)?;
    let [version] = hex::<1>(known.get(..2)?)?;
    let is_divided = [2_usize, 35, 52].iter().all(|at| known.get(*at) == Some(&b'-'));
    let is_ended = match more.first() {
        None => true,
        Some(next) => version > 0 && *next == b'-',
    };
    if version == 0xff || !is_divided || !is_ended {
        return None;
    }
    let (trace_id, parent_id) = (id(known.get(3..35)?)?, id(known.get(36..52)?)?);
    let [flags] = hex::<1>(known.get(53..)?)?;
    Some(TraceContext {
        ids: Some((trace_id, parent_id)),
        sampled: Some(flags & SAMPLED != 0),
        debug: false,
        random: flags & RANDOM != 0,
        short: false,
        form: Form::W3c,
    })
}

/// Reads the single header `b3`; `None`: it is invalid.
fn parse_b3(value: &[u8]) -> Option<TraceContext> {
    let context = TraceContext {
        ids: None,
        sampled: None,
        debug: false,
        random: false,
        short: false,
        form: Form::B3Single,
    };
    if let Some((sampled, debug)) = b3_state(value) {
        return Some(TraceContext { sampled: Some(sampled), debug, ..context });
    }
    let mut parts = value.split(|byte| *byte == b'-');
    let (trace_id, short) = b3_trace_id(parts.next()?)?;
    let parent_id = id(parts.next()?)?;
    let (sampled, debug) = match parts.next() {
        None => (None, false),
        Some(state) => {
            let (sampled, debug) = b3_state(state)?;
            (Some(sampled), debug)
        }
    };
    // The parent of the span that has sent it, which concerns nobody here.
    if let Some(grandparent) = parts.next() {
        id::<8>(grandparent)?;
    }
    if parts.next().is_some() {
        return None;
    }
    Some(TraceContext { ids: Some((trace_id, parent_id)), sampled, debug, short, ..context })
}

/// Whether it is recorded, and whether for debugging.
fn b3_state(text: &[u8]) -> Option<(bool, bool)> {
    match text {
        b"0" => Some((false, false)),
        b"1" => Some((true, false)),
        b"d" => Some((true, true)),
        _ => None,
    }
}

/// Of 128 bits, or of 64; the latter as the low half.
fn b3_trace_id(text: &[u8]) -> Option<(TraceId, bool)> {
    if text.len() != 16 {
        return Some((id(text)?, false));
    }
    let low = u64::from_be_bytes(id(text)?);
    Some((u128::from(low).to_be_bytes(), true))
}

/// An id in lower-case hexadecimal digits that is not zero.
fn id<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    hex(text).filter(|id| *id != [0; N])
}

fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = (digit(*high)? << 4) | digit(*low)?;
    }
    Some(bytes)
}

fn push_hex(out: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
}

/// How many of all trace ids are sampled, out of 2^56.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share(u64);

impl Share {
    /// No trace begins here.
    pub const NONE: Self = Self(0);
    /// Every request without a parent begins a trace.
    pub const ALL: Self = Self(ALL_IDS);

    /// So many of 2^56.
    pub fn new(ids: u64) -> Self {
        Self(ids.min(ALL_IDS))
    }

    /// A fraction of 1.
    pub fn of_fraction(fraction: f64) -> Self {
        // What is not a number becomes none.
        Self::new((fraction.clamp(0.0, 1.0) * ALL_IDS as f64) as u64)
    }

    /// How many of 2^56.
    pub fn ids(self) -> u64 {
        self.0
    }

    /// Whether a trace with this id is among them (ProbabilitySampler of OpenTelemetry).
    pub fn takes(self, trace_id: &TraceId) -> bool {
        let low = trace_id.last_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        (low & (ALL_IDS - 1)) >= ALL_IDS - self.0
    }

    /// The threshold as `tracestate` has it: the digits of 56 bits, without zeros at the end.
    fn threshold(self) -> String {
        let digits = format!("{:014x}", ALL_IDS - self.0);
        let short = digits.trim_end_matches('0');
        if short.is_empty() { "0".to_owned() } else { short.to_owned() }
    }
}

/// A request of which a span is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its trace.
    pub trace_id: TraceId,
    /// The span that is its parent; `None`: it begins the trace.
    pub parent_id: Option<SpanId>,
    /// B3: recorded whatever samplers say.
    pub debug: bool,
    /// The last seven bytes of the trace id are random.
    pub random: bool,
    /// The trace id is written with 64 bits.
    pub short: bool,
    /// How the context is written.
    pub form: Form,
    /// The share by which it was sampled here, if its trace begins here.
    root: Option<Share>,
}

/// Whether a span is made of a request; `None`: no, and its headers stay as they are. `share`: how many requests are
/// sampled whose parent has not decided. `random` makes the id of a trace that begins here.
pub fn decide(
    parent: Option<&TraceContext>,
    share: Share,
    random: impl FnOnce() -> TraceId,
) -> Option<Recorded> {
    let Some(parent) = parent else {
        if share == Share::NONE {
            return None;
        }
        let trace_id = random();
        let root = Recorded {
            trace_id,
            parent_id: None,
            debug: false,
            random: true,
            short: false,
            form: Form::W3c,
            root: Some(share),
        };
        return share.takes(&trace_id).then_some(root);
    };
    let is_sampled = match (parent.sampled, &parent.ids) {
        (Some(decided), _) => decided,
        (None, Some((trace_id, _))) => share.takes(trace_id),
        (None, None) => false,
    };
    if !is_sampled {
        return None;
    }
    let trace_id = parent.ids.map_or_else(random, |(trace_id, _)| trace_id);
    Some(Recorded {
        trace_id,
        parent_id: parent.ids.map(|(_, parent_id)| parent_id),
        debug: parent.debug,
        random: parent.random,
        short: parent.short,
        form: parent.form,
        root: None,
    })
}

/// What becomes of the header lines of a request that is recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewritten {
    /// Lines that say this now, once each.
    pub set: Vec<(&'static str, String)>,
    /// Lines that are taken off.
    pub removed: Vec<&'static str>,
}

impl Recorded {
    /// The flags of W3C, as they go on.
    pub fn flags(&self) -> u8 {
        if self.random { SAMPLED | RANDOM } else { SAMPLED }
    }

    /// The `tracestate` of a trace that begins here.
    pub fn tracestate(&self) -> Option<String> {
        self.root.map(|share| format!("ot=th:{}", share.threshold()))
    }

    /// The lines that name a span as the parent of whatever the request causes. A `tracestate` that came with the parent
    /// stays as it is.
    pub fn lines(&self, span_id: &SpanId) -> Rewritten {
        let mut rewritten = Rewritten::default();
        let mut trace = String::with_capacity(64);
        match self.form {
            Form::W3c => {
                trace.push_str("00-");
                push_hex(&mut trace, &self.trace_id);
                trace.push('-');
                push_hex(&mut trace, span_id);
                trace.push('-');
                push_hex(&mut trace, &[self.flags()]);
                rewritten.set.push(("traceparent", trace));
                // Whatever it says belongs to a trace that nobody could read.
                if let Some(state) = self.tracestate() {
                    rewritten.set.push(("tracestate", state));
                }
            }
            Form::B3Single => {
                self.push_b3_id(&mut trace);
                trace.push('-');
                push_hex(&mut trace, span_id);
                trace.push_str(if self.debug { "-d" } else { "-1" });
                rewritten.set.push(("b3", trace));
            }
            Form::B3Multi => {
                self.push_b3_id(&mut trace);
                let mut span = String::with_capacity(16);
                push_hex(&mut span, span_id);
                rewritten.set.extend([("x-b3-traceid", trace), ("x-b3-spanid", span)]);
                rewritten.removed.push("x-b3-parentspanid");
                if self.debug {
                    // It implies the decision, which is then not written (B3, "Debug flag").
                    rewritten.set.push(("x-b3-flags", "1".to_owned()));
                    rewritten.removed.push("x-b3-sampled");
                } else {
                    rewritten.set.push(("x-b3-sampled", "1".to_owned()));
                }
            }
        }
        rewritten
    }

    fn push_b3_id(&self, out: &mut String) {
        let (_, low) = self.trace_id.split_at(8);
        push_hex(out, if self.short { low } else { &self.trace_id });
    }
}
