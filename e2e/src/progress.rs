//! What a person sees while something takes time: one line per step, with the time since the start.

use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// Starts the clock; the first call counts.
pub fn start() {
    START.get_or_init(Instant::now);
}

/// Says what happens now.
pub fn step(what: &str) {
    let elapsed = START.get_or_init(Instant::now).elapsed().as_secs();
    eprintln!("[{:02}:{:02}] {what}", elapsed / 60, elapsed % 60);
}
