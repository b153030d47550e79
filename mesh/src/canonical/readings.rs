//! Every reading of a request's path that an application may have.
//!
//! In: a request target. Out: the path as it was sent, and what it becomes when a server, framework or
//! handler decodes, shortens or normalises it, in any combination and up to twice (a reverse proxy in the
//! same pod, and the application behind it).
//!
//! Some changes are not readings, because an application that makes them gives one resource several names
//! itself: other case, Unicode normalisation, `+` for a space, `%u002f`, and suffixes such as `.json`. A
//! rule that must hold for those applications is an allow rule.

/// The most readings that are told apart. An ordinary path has one, one with an unusual character two to
/// six, and one that combines every kind of trick has hundreds, and is nobody's ordinary path.
const MAX_READINGS: usize = 64;
/// Bytes of all readings beyond twice the path's own length. Keeps the work linear in what the client sent.
const MAX_BYTES: usize = 32 * 1024;
/// A path up to this long is kept without an allocation.
const SHORT: usize = 96;

/// Every reading of a request's path that an application may have.
///
/// The path as it was sent is one of them. A path with nothing unusual in it has no other one, and one of
/// up to 96 bytes then needs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readings {
    sent: Text,
    others: Vec<Vec<u8>>,
    complete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Text {
    Short { bytes: [u8; SHORT], length: u8 },
    Long(Box<[u8]>),
}

impl Text {
    fn new(text: &[u8]) -> Self {
        let mut bytes = [0; SHORT];
        match bytes.get_mut(..text.len()) {
            Some(room) => {
                room.copy_from_slice(text);
                Self::Short { bytes, length: text.len() as u8 }
            }
            None => Self::Long(text.into()),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { bytes, length } => bytes.get(..usize::from(*length)).unwrap_or(bytes),
            Self::Long(text) => text,
        }
    }
}

/// What one kind of reader makes of a path; `None` where that changes nothing.
type Step = fn(&[u8]) -> Option<Vec<u8>>;

/// What readers do to a path between two rounds of decoding. Each may or may not be done.
const ROUND: [Step; 9] = [
    before_nul,
    before_question_mark,
    before_hash,
    with_backslashes_as_slashes,
    without_parameters,
    trimmed,
    with_slashes_merged,
    without_dot_segments,
    with_slashes_merged,
];

/// Decoding once, and once more behind a proxy that has decoded.
const DECODED: usize = 2;

/// The readings of a target's path.
///
/// - Origin form (`/a?b`): the path before the query.
/// - Absolute form (`http://host/a?b`): its path.
/// - `*` and the authority form of CONNECT (`host:443`): the target itself, which only `/**` matches.
/// - Anything else is malformed: the target itself, which no allow rule with a path matches except `/**`, and
///   what lenient readers take it for.
pub fn readings(target: &str) -> Readings {
    let target = target.as_bytes();
    let target = until(target, |byte| byte == b'?').unwrap_or(target);
    if target.starts_with(b"/") {
        let mut readings = Readings::of(target);
        if !is_plain(target) {
            readings.find(target.len());
        }
        return readings;
    }
    if target == b"*" || is_authority(target) {
        return Readings::of(target);
    }
    let mut readings;
    if let Some((_, rest)) = split_scheme(target).filter(|(_, rest)| rest.starts_with(b"//")) {
        let rest = rest.get(2..).unwrap_or(&[]);
        readings = Readings::of(from(rest, b'/').unwrap_or(b"/"));
        // Where a browser's URL parser ends the authority.
        if let Some(path) = from(rest, b'\\') {
            readings.add(path.to_vec());
        }
        if let Some(rest) = until(rest, |byte| byte == b'#') {
            readings.add(from(rest, b'/').unwrap_or(b"/").to_vec());
        }
    } else {
        readings = Readings::of(target);
        readings.add([&b"/"[..], target].concat());
        if let Some((_, rest)) = split_scheme(target) {
            let slash: &[u8] = if rest.starts_with(b"/") { b"" } else { b"/" };
            readings.add([slash, rest].concat());
        }
    }
    readings.find(target.len());
    readings
}

impl Readings {
    /// The path as it was sent.
    pub fn as_sent(&self) -> &[u8] {
        self.sent.as_bytes()
    }

    /// All readings; the first is the path as it was sent.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(self.as_sent()).chain(self.others.iter().map(Vec::as_slice))
    }

    /// Whether these are all readings. Otherwise the path has more than are told apart: a rule that denies
    /// has to match it, and one that allows must not.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    fn of(path: &[u8]) -> Self {
        Self { sent: Text::new(path), others: Vec::new(), complete: true }
    }

    fn get(&self, index: usize) -> Option<&[u8]> {
        match index.checked_sub(1) {
            None => Some(self.as_sent()),
            Some(index) => self.others.get(index).map(Vec::as_slice),
        }
    }

    fn add(&mut self, reading: Vec<u8>) {
        if !self.iter().any(|known| known == reading) {
            self.others.push(reading);
        }
    }

    fn find(&mut self, length: usize) {
        let most = MAX_BYTES + 2 * length;
        self.step(without_authority, most);
        for round in 0..=DECODED {
            if round > 0 {
                self.decode(most);
            }
            for step in ROUND {
                self.step(step, most);
            }
        }
    }

    /// Adds what a step makes of each reading.
    fn step(&mut self, step: Step, most: usize) {
        if !self.complete {
            return;
        }
        for index in 0..=self.others.len() {
            if let Some(reading) = self.get(index).and_then(step) {
                self.add_within(reading, most);
            }
        }
    }

    /// Adds each reading decoded: whole, and but for what would become a slash, as a router does that splits
    /// the path first.
    fn decode(&mut self, most: usize) {
        if !self.complete {
            return;
        }
        for index in 0..=self.others.len() {
            for step in [decoded, decoded_but_slashes] {
                if let Some(reading) = self.get(index).and_then(step) {
                    self.add_within(reading, most);
                }
            }
        }
        self.step(lossy, most);
    }

    fn add_within(&mut self, reading: Vec<u8>, most: usize) {
        let bytes: usize = self.others.iter().map(Vec::len).sum();
        if self.others.len() + 1 >= MAX_READINGS || bytes + reading.len() > most {
            let known = self.iter().any(|known| known == reading);
            self.complete &= known;
        } else {
            self.add(reading);
        }
    }
}

/// Whether no reader makes anything else of the path: most paths, found in one pass.
fn is_plain(path: &[u8]) -> bool {
    let mut previous = 0;
    for byte in path {
        match byte {
            b'%' | b'\\' | b';' | b'#' | 0..=b' ' => return false,
            b'/' if matches!(previous, b'/' | b'.') => return false,
            _ => previous = *byte,
        }
    }
    previous != b'.'
}

/// `host:443`, `[::1]:443`.
fn is_authority(target: &[u8]) -> bool {
    let Some(colon) = target.iter().rposition(|byte| *byte == b':') else { return false };
    let (host, port) = target.split_at(colon);
    let port = port.get(1..).unwrap_or(&[]);
    !host.is_empty()
        && !port.is_empty()
        && port.iter().all(u8::is_ascii_digit)
        && !host.iter().any(|byte| matches!(byte, b'/' | b'\\' | b'%' | b'#' | b';' | 0..=b' '))
}

fn split_scheme(target: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = target.iter().position(|byte| *byte == b':')?;
    let (scheme, rest) = target.split_at(colon);
    let valid = scheme.first().is_some_and(u8::is_ascii_alphabetic)
        && scheme.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte));
    valid.then(|| (scheme, rest.get(1..).unwrap_or(&[])))
}

/// The part from the first `byte` on.
fn from(text: &[u8], byte: u8) -> Option<&[u8]> {
    text.get(text.iter().position(|b| *b == byte)?..)
}

/// The part before the first byte that ends it; `None` where none does.
fn until(text: &[u8], ends: impl Fn(u8) -> bool) -> Option<&[u8]> {
    text.get(..text.iter().position(|byte| ends(*byte))?)
}

fn segments(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
}

/// Replaces each segment by a part of it.
fn each_segment(path: &[u8], part: fn(&[u8]) -> &[u8]) -> Option<Vec<u8>> {
    if segments(path).all(|segment| part(segment).len() == segment.len()) {
        return None;
    }
    let mut out = Vec::with_capacity(path.len());
    for (index, segment) in segments(path).enumerate() {
        if index > 0 {
            out.push(b'/');
        }
        out.extend_from_slice(part(segment));
    }
    Some(out)
}

/// `//host/a`, as a reader of relative references takes it: the path on another host (`new URL(…)` of Node
/// and browsers, which also takes a backslash for a slash).
fn without_authority(path: &[u8]) -> Option<Vec<u8>> {
    let slash = |byte: &u8| matches!(byte, b'/' | b'\\');
    if !(path.first().is_some_and(slash) && path.get(1).is_some_and(slash)) {
        return None;
    }
    let host = path.iter().position(|byte| !slash(byte)).unwrap_or(path.len());
    let rest = path.get(host..).unwrap_or(&[]);
    let end = rest.iter().position(slash).map_or(rest.len(), |at| at + 1);
    Some([&b"/"[..], rest.get(end..).unwrap_or(&[])].concat())
}

/// Percent-decoded once, every character. A broken escape stays as it is.
pub(crate) fn decoded(path: &[u8]) -> Option<Vec<u8>> {
    decode(path, b"")
}

fn decoded_but_slashes(path: &[u8]) -> Option<Vec<u8>> {
    decode(path, b"/\\")
}

fn decode(path: &[u8], kept: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let mut out = Vec::new();
    let mut rest = path;
    let mut changed = false;
    while let Some(at) = rest.iter().position(|byte| *byte == b'%') {
        let (before, escape) = rest.split_at(at);
        out.extend_from_slice(before);
        let byte = match escape {
            [_, high, low, ..] => digit(*high).zip(digit(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        let taken = match byte.filter(|byte| !kept.contains(byte)) {
            Some(byte) => {
                out.push(byte);
                changed = true;
                3
            }
            None => {
                out.push(b'%');
                1
            }
        };
        rest = escape.get(taken..).unwrap_or(&[]);
    }
    out.extend_from_slice(rest);
    changed.then_some(out)
}

/// Invalid UTF-8 as lenient decoders read it: overlong sequences are the ASCII character that they hide
/// (`%C0%AF` is a slash), other invalid bytes are dropped.
fn lossy(path: &[u8]) -> Option<Vec<u8>> {
    if std::str::from_utf8(path).is_ok() {
        return None;
    }
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, more)) = rest.split_first() {
        rest = more;
        match (*first, more.first().copied()) {
            (0xc0 | 0xc1, Some(next @ 0x80..=0xbf)) => {
                out.push((first & 1) << 6 | (next & 0x3f));
                rest = more.get(1..).unwrap_or(&[]);
            }
            _ => out.push(*first),
        }
    }
    Some(out.utf8_chunks().flat_map(|chunk| chunk.valid().bytes()).collect())
}

/// As C strings end.
fn before_nul(path: &[u8]) -> Option<Vec<u8>> {
    until(path, |byte| byte == 0).map(<[u8]>::to_vec)
}

fn before_question_mark(path: &[u8]) -> Option<Vec<u8>> {
    until(path, |byte| byte == b'?').map(<[u8]>::to_vec)
}

fn before_hash(path: &[u8]) -> Option<Vec<u8>> {
    until(path, |byte| byte == b'#').map(<[u8]>::to_vec)
}

fn with_backslashes_as_slashes(path: &[u8]) -> Option<Vec<u8>> {
    let slash = |byte: &u8| if *byte == b'\\' { b'/' } else { *byte };
    path.contains(&b'\\').then(|| path.iter().map(slash).collect())
}

/// `/admin;a=b/x` is `/admin/x` to servlets (CVE-2026-73551: before they look for dot segments).
fn without_parameters(path: &[u8]) -> Option<Vec<u8>> {
    each_segment(path, |segment| until(segment, |byte| byte == b';').unwrap_or(segment))
}

/// Segments without white space around them, and without dots and spaces after them (Windows).
fn trimmed(path: &[u8]) -> Option<Vec<u8>> {
    each_segment(path, |segment| {
        let start = segment.iter().position(|byte| *byte > b' ').unwrap_or(segment.len());
        let segment = segment.get(start..).unwrap_or(&[]);
        let end = segment.iter().rposition(|byte| *byte > b' ').map_or(0, |at| at + 1);
        let segment = segment.get(..end).unwrap_or(&[]);
        match segment.iter().rposition(|byte| *byte > b' ' && *byte != b'.') {
            Some(last) => segment.get(..=last).unwrap_or(segment),
            // Nothing but dots: those of a dot segment.
            None => segment,
        }
    })
}

fn with_slashes_merged(path: &[u8]) -> Option<Vec<u8>> {
    if !path.windows(2).any(|pair| pair == b"//") {
        return None;
    }
    let mut out = Vec::with_capacity(path.len());
    for byte in path {
        if *byte != b'/' || out.last() != Some(&b'/') {
            out.push(*byte);
        }
    }
    Some(out)
}

/// RFC 3986 §5.2.4; `..` above the root is dropped.
fn without_dot_segments(path: &[u8]) -> Option<Vec<u8>> {
    let path = path.strip_prefix(b"/")?;
    let is_dots = |segment: &[u8]| segment == b"." || segment == b"..";
    if !segments(path).any(is_dots) {
        return None;
    }
    let mut out = Vec::with_capacity(path.len() + 1);
    let mut ends_open = false;
    for segment in segments(path) {
        ends_open = is_dots(segment);
        if segment == b".." {
            let parent = out.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            out.truncate(parent);
        } else if !ends_open {
            out.push(b'/');
            out.extend_from_slice(segment);
        }
    }
    if ends_open || out.is_empty() {
        out.push(b'/');
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(target: &str) -> Vec<String> {
        readings(target).iter().map(|reading| String::from_utf8_lossy(reading).into_owned()).collect()
    }

    #[test]
    fn an_ordinary_path_has_one_reading_without_an_allocation() {
        for target in
            ["/", "/v1/users/7", "/.well-known/x", "/a.b/c~d?q=/../;%2f", "/v1/x:delete", "/caf\u{e9}"]
        {
            let readings = readings(target);
            assert_eq!(readings.as_sent(), target.split('?').next().unwrap().as_bytes(), "{target}");
            assert!(readings.others.is_empty() && matches!(readings.sent, Text::Short { .. }), "{target}");
        }
    }

    #[test]
    fn each_kind_of_reader_adds_its_reading() {
        for (target, others) in [
            ("/group%2Fproject", &["/group/project"][..]),
            ("/%2561", &["/%61", "/a"]),
            ("/a//b", &["/a/b"]),
            ("/a/../b", &["/b"]),
            ("/../b", &["/b"]),
            ("/a/..", &["/"]),
            ("/a;x=1/b", &["/a/b"]),
            ("/a\\b", &["/a/b"]),
            ("/a%5Cb", &["/a\\b", "/a/b"]),
            ("/a#b", &["/a"]),
            ("/a%23b", &["/a#b", "/a"]),
            ("/a%3Fb", &["/a?b", "/a"]),
            ("/a%00b", &["/a\0b", "/a"]),
            ("/a./b", &["/a/b"]),
            ("/a%20/b", &["/a /b", "/a/b"]),
            ("//host/a", &["/a", "/host/a"]),
            ("/a%zz%4", &[]),
            ("/caf%C3%A9", &["/caf\u{e9}"]),
            ("/a%2Fb%3Ac", &["/a/b:c", "/a%2Fb:c"]),
        ] {
            let found = all(target);
            assert_eq!(found.first().map(String::as_str), Some(target));
            assert_eq!(&found[1..], others, "{target}");
        }
    }

    #[test]
    fn invalid_utf8_is_read_raw_and_as_lenient_decoders_do() {
        let bytes = |target| readings(target).iter().map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(bytes("/a%FFb"), [&b"/a%FFb"[..], b"/a\xffb", b"/ab"]);
        assert_eq!(bytes("/a%C0%AFb"), [&b"/a%C0%AFb"[..], b"/a\xc0\xafb", b"/a/b"]);
    }

    #[test]
    fn an_absolute_target_is_read_as_its_path() {
        for (target, expected) in [
            ("http://host/a?b", &["/a"][..]),
            ("http://host", &["/"]),
            ("http://host?b", &["/"]),
            ("HTTP://u:p@host:80/a%2Fb", &["/a%2Fb", "/a/b"]),
            ("*", &["*"]),
            ("host:443", &["host:443"]),
            ("[::1]:443", &["[::1]:443"]),
        ] {
            assert_eq!(all(target), expected, "{target}");
        }
        for target in ["http:/admin/x", "http:admin/x", "admin/x", "http://h\\admin/x", "x:%2Fadmin/x", ""] {
            let found = all(target);
            assert!(target.is_empty() || found.iter().any(|path| path == "/admin/x"), "{target}: {found:?}");
        }
    }

    #[test]
    fn the_number_and_the_bytes_of_readings_are_bounded() {
        let tricks = "/x/%25252e%2e/./a//b;c/%2F/..%5c..%3B/%23/%3F/%00/%20/%FF";
        assert!(!readings(tricks).is_complete());
        for repeated in ["/%2f..;%5c", "//..", "/;", "%25"] {
            let target = format!("/{}", repeated.repeat(60 * 1024 / repeated.len()));
            let readings = readings(&target);
            let bytes: usize = readings.iter().map(<[u8]>::len).sum();
            assert!(readings.iter().count() <= MAX_READINGS, "{repeated}");
            assert!(bytes <= MAX_BYTES + 3 * target.len(), "{repeated}: {bytes}");
        }
    }

    proptest! {
        #[test]
        fn the_path_as_sent_is_a_reading_and_readings_are_distinct(target in "/[a-z./;%0-9A-F\\\\?#~-]{0,32}") {
            let readings = readings(&target);
            prop_assert_eq!(readings.as_sent(), target.split('?').next().unwrap().as_bytes());
            let mut found: Vec<&[u8]> = readings.iter().collect();
            let count = found.len();
            found.sort_unstable();
            found.dedup();
            prop_assert_eq!(found.len(), count);
        }
    }
}
