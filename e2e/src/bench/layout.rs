//! `cargo xtask bench --layout`: writes `sidecar/at-rest.ld`, which puts together the functions that run in a sidecar at
//! rest.
//!
//! Two sidecars run under callgrind from their start until they have rested for a while after their first request. The
//! linker's map has the section of each function that ran.

mod script;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::measure::host_and_port;
use super::proxies::{self, Product, Programs, ProxyPair};
use super::testbed::Testbed;
use crate::build::cargo_with;
use crate::host;
use crate::progress::step;

/// How long the sidecars rest: longer than the 20 s after which they give free memory back.
const REST: Duration = Duration::from_secs(30);

/// Records what runs at rest, and writes the script.
pub fn run() -> Result<()> {
    host::require_root()?;
    host::install_packages(super::PROGRAMS)?;
    host::install_packages(&[("valgrind", "valgrind")])?;
    let built = build()?;
    let map = String::from_utf8_lossy(&fs::read(&built.map)?).into_owned();
    let sections = script::sections(&map);
    ensure!(!sections.is_empty(), "{} is not a map of LLVM's linker", built.map.display());
    let programs = Programs::tulle(built.program)?;
    let testbed = Testbed::new()?;
    step(&format!("recording what runs at rest, for {} s", REST.as_secs()));
    let ran = testbed.noting(at_rest(&testbed, &programs))?;
    let path = host::workspace().join("sidecar/at-rest.ld");
    host::write(&path, script::script(&sections, &ran))?;
    println!("{} functions ran; wrote {}", ran.len(), path.display());
    Ok(())
}

/// A sidecar with symbols, and the linker's map of it.
struct Built {
    program: PathBuf,
    map: PathBuf,
}

/// Builds it as the image's, but in a folder of its own: the usual one would be compiled again afterwards.
fn build() -> Result<Built> {
    host::install_packages(host::TOOLCHAIN)?;
    let usual = proxies::target()?;
    let triple = usual.file_name().context("cargo's target directory has no folder of a target")?;
    let folder = usual.with_file_name("layout");
    fs::create_dir_all(&folder)?;
    let map = folder.join("map");
    let target = folder.display().to_string();
    let link = format!("link-arg=-Wl,--no-demangle,-Map={}", map.display());
    let arguments = [
        "rustc",
        "--locked",
        "--release",
        "--package",
        "tulle-sidecar",
        "--bin",
        "tulle-sidecar",
        "--target-dir",
        &target,
        "--",
        "-C",
        &link,
    ];
    // Without the symbols callgrind would have no names.
    let strip = ("CARGO_PROFILE_RELEASE_STRIP".to_owned(), "debuginfo".to_owned());
    cargo_with(host::workspace(), "compiling sidecar (with symbols)", &arguments, &[strip])?;
    Ok(Built { program: folder.join(triple).join("release").join("tulle-sidecar"), map })
}

/// Names of the functions that run in either sidecar.
fn at_rest(testbed: &Testbed, programs: &Programs) -> Result<BTreeSet<String>> {
    let folder = testbed.folder.join("callgrind");
    fs::create_dir_all(&folder)?;
    // The sidecars run as another user.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    let mut programs = programs.with_sidecar(&programs.sidecar, &folder);
    programs.sidecar_runner.push("--demangle=no".to_owned());
    let pair = ProxyPair::start(Product::Tulle, testbed, &programs)?;
    testbed.wait_for(&host_and_port(&pair.targets.http1))?;
    thread::sleep(REST);
    pair.terminate()?;
    read(&folder)
}

/// Names of the functions in callgrind's output files.
fn read(folder: &Path) -> Result<BTreeSet<String>> {
    let mut ran = BTreeSet::new();
    for file in fs::read_dir(folder)? {
        let profile = fs::read_to_string(file?.path())?;
        ran.extend(script::functions(&profile).map(str::to_owned));
    }
    ensure!(!ran.is_empty(), "callgrind wrote no names of functions to {}", folder.display());
    Ok(ran)
}
