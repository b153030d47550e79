//! A tap that shows requests of both sidecars, and counts what it has shown.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use tokio::task::JoinHandle;
use tulle_mesh::proto::{Tap, TapFilter};
use tulle_operator::tap::{Tapping, Taps, Wanted};

/// Requests that each sidecar shows per second: the default of `tulle tap`.
const RATE: u32 = 20;

/// The tap, while there is one.
pub struct Switched {
    taps: Arc<Taps>,
    file: PathBuf,
    running: Option<JoinHandle<()>>,
}

impl Switched {
    /// No tap. `file`: where the number of requests is written that it has shown.
    pub fn new(taps: Arc<Taps>, file: PathBuf) -> Self {
        Self { taps, file, running: None }
    }

    /// Begins.
    ///
    /// # Errors
    /// When the tap is refused.
    pub fn apply(&mut self) -> Result<()> {
        let wanted = Wanted { namespace: None, workload: None };
        let message = Tap { id: 0, filter: Some(TapFilter::default()), rate: RATE, headers: Vec::new() };
        let tapping = self.taps.start("bench", wanted, message, Instant::now())?;
        self.running = Some(tokio::spawn(read(tapping, self.file.clone())));
        Ok(())
    }

    /// Ends.
    pub fn delete(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

async fn read(mut tapping: Tapping, file: PathBuf) {
    let mut shown = 0_u64;
    while tapping.events.recv().await.is_some() {
        shown += 1;
        if let Err(error) = fs::write(&file, shown.to_string()) {
            eprintln!("cannot write how many requests the tap has shown: {error}");
        }
    }
}
