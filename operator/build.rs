//! Compiles the description of the query API over gRPC without a `protoc` binary. Here and not in `tulle-mesh`: the
//! sidecar, which links that, does not need it.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../mesh/proto/tulle/v1");
    let includes = ["../mesh/proto"];
    // Both files are of package tulle.v1, and a user may compile both: a name that is in both fails here.
    protox::compile(["tulle/v1/mesh.proto", "tulle/v1/query.proto"], includes)?;
    let descriptors = protox::compile(["tulle/v1/query.proto"], includes)?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
