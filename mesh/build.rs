//! Compiles the protocol descriptions without a `protoc` binary.

use std::path::Path;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["tulle/v1/mesh.proto", "grpc/health/v1/health.proto", "opentelemetry/trace.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    // For who reads resources by the names of their fields. The comments would be most of it.
    let mut described = descriptors.clone();
    described.file.iter_mut().for_each(|file| file.source_code_info = None);
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("descriptors.bin"), described.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
