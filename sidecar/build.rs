//! Options of the linker for the binary, with which each pod keeps less of it in memory. Both only in native builds.
//!
//! - Packed relative relocations (DT_RELR): 0.4 MB less of the file, which the start would read once and every pod would
//!   keep in memory. Only where the C library that is linked in can apply them: glibc 2.36 and later.
//! - The functions that run in a sidecar at rest stand together (`at-rest.ld`): 5.9 MiB at rest instead of 8.9 MiB, because
//!   Linux maps the 64 KiB around each page that is touched. Only for the architecture on which they were recorded, and
//!   where the build is optimised. A name that no longer exists matches nothing and costs only memory.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=at-rest.ld");
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let target = |name: &str| variable(&format!("CARGO_CFG_TARGET_{name}"));
    let native = env::var("HOST").ok() == env::var("TARGET").ok();
    if !native || target("OS") != "linux" || target("ENV") != "gnu" {
        return;
    }
    if glibc() >= Some((2, 36)) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    if target("ARCH") == "x86_64" && variable("PROFILE") == "release" {
        let script = format!("{}/at-rest.ld", variable("CARGO_MANIFEST_DIR"));
        for argument in ["-T", &script] {
            println!("cargo:rustc-link-arg-bin=tulle-sidecar={argument}");
        }
    }
}

/// The version of the C library of this machine, which a native build links in.
fn glibc() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = version.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
