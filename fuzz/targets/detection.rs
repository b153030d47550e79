//! What a connection speaks, by its first bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tulle_sidecar::detect::classify;

fuzz_target!(|bytes: &[u8]| {
    assert_eq!(classify(&[]), None, "decided without a byte");
    let mut decided = None;
    for length in 1..=bytes.len().min(512) {
        let now = classify(&bytes[..length]);
        if decided.is_some() {
            assert_eq!(now, decided, "changed its mind after {length} bytes");
        }
        decided = now;
    }
});
