//! The image of a collector of traces, for the tests: the OTLP receiver of the OpenTelemetry Collector, which prints each
//! span.
//!
//! In: the Go module `e2e/collector`. Out: an archive of an image, kept in the cache by its content.

use std::path::PathBuf;

use anyhow::Result;

use crate::archive;
use crate::cluster;
use crate::host;
use crate::images;

/// The image's name.
pub const IMAGE: &str = "tulle.local/collector:dev";
/// The port of its OTLP receiver, over gRPC.
pub const PORT: u16 = 4317;

/// The archive of the image, made now unless the cache holds it.
pub fn image() -> Result<PathBuf> {
    let program = cluster::collector()?;
    let key = host::content_key(&[&program], &format!("{IMAGE} {}", archive::FORMAT))?;
    let archive = images::place(IMAGE, &key)?;
    if !archive.is_file() {
        images::pack(IMAGE, Some(&program), false, &archive)?;
    }
    Ok(archive)
}
