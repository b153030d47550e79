//! A header block, sorted into pseudo-header fields and others (RFC 9113 §8.2, §8.3).

use bytes::Bytes;

use super::MAX_HEADER_LIST;
use super::hpack::{Field, Kind};

/// The fields of a block.
#[derive(Debug, Default)]
pub struct Block {
    /// `:method`
    pub method: Option<Bytes>,
    /// `:scheme`
    pub scheme: Option<Bytes>,
    /// `:authority`
    pub authority: Option<Bytes>,
    /// `:path`
    pub path: Option<Bytes>,
    /// `:status`
    pub status: Option<u16>,
    /// End-to-end fields.
    pub headers: Vec<(Bytes, Bytes)>,
    /// What makes the message malformed.
    pub fault: Option<&'static str>,
    /// It is longer than [`MAX_HEADER_LIST`]; what is beyond has been left out.
    pub is_too_large: bool,
    pub(super) size: usize,
}

impl Block {
    /// Takes the next field.
    pub(super) fn take(&mut self, field: Field) {
        self.size += field.cost();
        if self.size > MAX_HEADER_LIST as usize {
            self.is_too_large = true;
            return;
        }
        if !field.is_value {
            self.fault = Some("a value with control characters");
        }
        let place = match field.kind {
            Kind::Regular => {
                if self.headers.capacity() == 0 {
                    self.headers.reserve(16);
                }
                return self.headers.push((field.name, field.value));
            }
            Kind::Te => {
                // For this connection only.
                if !field.value.eq_ignore_ascii_case(b"trailers") {
                    self.fault = Some("a te that is not trailers");
                }
                return;
            }
            Kind::Forbidden => return self.fault = Some("a name that HTTP/2 forbids"),
            Kind::Status => {
                let status = std::str::from_utf8(&field.value).ok().and_then(|text| text.parse().ok());
                let is_status = field.value.len() == 3 && matches!(status, Some(100..=999));
                if self.status.is_some() || !is_status || !self.headers.is_empty() {
                    self.fault = Some("a bad :status");
                }
                return self.status = status;
            }
            Kind::Method => &mut self.method,
            Kind::Scheme => &mut self.scheme,
            Kind::Authority => &mut self.authority,
            Kind::Path => &mut self.path,
        };
        if place.is_some() || !self.headers.is_empty() {
            self.fault = Some("a pseudo-header field twice, or behind others");
        }
        *place = Some(field.value);
    }

    fn has_pseudo_of_request(&self) -> bool {
        [&self.method, &self.scheme, &self.authority, &self.path].into_iter().any(Option::is_some)
    }

    /// Whether a client may send it as the head of a request.
    pub(super) fn is_request(&self) -> bool {
        let is_connect = self.method.as_deref() == Some(b"CONNECT");
        let is_path = self.path.as_ref().is_some_and(|path| !path.is_empty());
        let is_whole = if is_connect {
            self.path.is_none() && self.scheme.is_none()
        } else {
            self.method.as_ref().is_some_and(|method| !method.is_empty()) && self.scheme.is_some() && is_path
        };
        self.fault.is_none() && self.status.is_none() && (is_whole || self.is_too_large)
    }

    /// Whether a server may send it as the head of an answer. `end`: nothing follows.
    pub(super) fn is_response(&self, end: bool) -> bool {
        let is_status = match self.status {
            // 101 has no meaning in HTTP/2, and an interim answer is no end.
            Some(101) | None => false,
            Some(..200) => !end,
            Some(_) => true,
        };
        self.fault.is_none() && !self.has_pseudo_of_request() && is_status
    }

    /// Whether it may be the trailers of a message.
    pub(super) fn is_trailers(&self) -> bool {
        self.fault.is_none() && !self.has_pseudo_of_request() && self.status.is_none()
    }

    /// The length that it declares, if it declares one.
    pub(super) fn declared(&self) -> Option<u64> {
        let (_, value) = self.headers.iter().find(|(name, _)| &name[..] == b"content-length")?;
        std::str::from_utf8(value).ok()?.parse().ok()
    }

    /// What its body is, if it says so.
    pub fn content_type(&self) -> Option<Bytes> {
        self.headers.iter().find(|(name, _)| &name[..] == b"content-type").map(|(_, value)| value.clone())
    }

    /// Memory that it holds, about.
    pub(super) fn size(&self) -> usize {
        self.size
    }
}
