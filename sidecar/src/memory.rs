//! How much memory the sidecar has. What is free of it goes back to the system, also if there is nothing to do.
//!
//! jemalloc gives back what has been free for five seconds, but looks at its clock only while it is used: what a burst
//! has left would stay for as long as the pod is idle.

use std::time::Duration;

use tikv_jemalloc_ctl::{Access as _, AsName as _, Result};
use tokio::time::sleep;

/// How often. Rare, because memory that is needed again afterwards costs a page fault.
const EVERY: Duration = Duration::from_secs(20);

/// Gives back what is free, at regular intervals, for as long as the sidecar runs.
pub async fn give_back() {
    loop {
        sleep(EVERY).await;
        if let Err(error) = purge() {
            // Another allocator, in tests.
            return tracing::debug!(%error, "free memory is not given back");
        }
    }
}

/// Resident memory of this process in bytes. `None`: the system does not say.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    kilobytes(&status)?.checked_mul(1024)
}

/// The value of `VmRSS` in a process's status, which is in units of 1,024 bytes.
fn kilobytes(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    value.trim().strip_suffix("kB")?.trim_end().parse().ok()
}

/// Gives back everything that is free now.
fn purge() -> Result<()> {
    let arenas: u32 = "arenas.narenas\0".name().read()?;
    for arena in 0..arenas {
        let name = format!("arena.{arena}.dirty_decay_ms\0");
        // Where the time until free memory is given back becomes zero, it is given back at once. An arena that no
        // thread has used cannot be asked.
        let decay: Result<isize> = name.as_str().name().update(0);
        if let Ok(before) = decay {
            name.as_str().name().write(before)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_a_process_is_more_than_a_megabyte_and_less_than_all() {
        let bytes = resident().unwrap();
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
        assert_eq!(kilobytes("VmHWM:\t  9000 kB\nVmRSS:\t    7212 kB\n"), Some(7_212));
        assert_eq!(kilobytes("VmHWM:\t  9000 kB\n"), None);
    }

    #[test]
    fn the_time_of_decay_is_what_it_was_after_free_memory_was_given_back() {
        let decay = || -> isize { "arena.0.dirty_decay_ms\0".name().read().unwrap() };
        let before = decay();
        purge().unwrap();
        assert_eq!(decay(), before);
        assert_ne!(before, 0);
    }
}
