//! The name of one refusal, which whoever was refused can pass on without saying what the rules are.

use std::fmt;
use std::str::FromStr;

/// Names a refusal of one pod's sidecar: 16 hexadecimal digits, of which the first half stands for the pod. It tells
/// the client nothing, and an operator who may look into the pod everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DenialId(u64);

/// A text is not the id of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id has 16 hexadecimal digits, as in the header tulle-denial")]
pub struct NoDenialId;

impl DenialId {
    /// The refusal of a pod with this number.
    pub fn new(pod_uid: &str, number: u32) -> Self {
        Self(u64::from(mark(pod_uid)) << 32 | u64::from(number))
    }

    /// Whether a pod may have given it. Of a million other pods, none or very few may have as well.
    pub fn may_be_of(self, pod_uid: &str) -> bool {
        self.0 >> 32 == u64::from(mark(pod_uid))
    }
}

/// FNV-1a: the same in every build, unlike the hashes of the standard library.
fn mark(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl fmt::Display for DenialId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

impl FromStr for DenialId {
    type Err = NoDenialId;

    fn from_str(text: &str) -> Result<Self, NoDenialId> {
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex {
            return Err(NoDenialId);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| NoDenialId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written_and_leads_to_its_pod() {
        let id = DenialId::new("0b8c0a5e-11f2-4a53-9d1c-0f5f9b4a9a10", 7);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().ends_with("00000007"));
        assert!(id.may_be_of("0b8c0a5e-11f2-4a53-9d1c-0f5f9b4a9a10"));
        assert!(!id.may_be_of("0b8c0a5e-11f2-4a53-9d1c-0f5f9b4a9a11"));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in ["", "7", "00000000000000007", "+000000000000007", "000000000000000g", "0x00000000000007"]
        {
            assert_eq!(text.parse::<DenialId>(), Err(NoDenialId), "{text}");
        }
    }
}
