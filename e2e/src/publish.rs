//! `cargo xtask images` builds what goes to a registry: Tulle's programs in the release profile, for each
//! architecture, as image archives. It prints the commands that push them under one name.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::archive::{self, Content};
use crate::build;
use crate::host;
use crate::images;
use crate::progress::{say, step};

/// A processor architecture that images are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// 64-bit ARM.
    Arm64,
}

/// The parts of Tulle that have images.
const PARTS: [&str; 3] = ["operator", "webhook", "sidecar"];

impl Arch {
    /// Its name in image manifests.
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Its name in Rust and GNU triples.
    fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    fn triple(self) -> String {
        format!("{}-unknown-linux-gnu", self.machine())
    }

    fn is_this_machine(self) -> bool {
        self.machine() == std::env::consts::ARCH
    }

    /// The C compiler and library of another architecture, and cargo's variables that name them.
    fn cross(self) -> Result<Vec<(String, String)>> {
        if self.is_this_machine() {
            return Ok(Vec::new());
        }
        let gnu = format!("{}-linux-gnu", self.machine());
        let (compiler, headers) = (format!("{gnu}-gcc"), format!("/usr/{gnu}/include/stdio.h"));
        let packages = (format!("gcc-{}", gnu.replace('_', "-")), format!("libc6-dev-{}-cross", self.name()));
        host::install_packages(&[(&compiler, &packages.0), (&headers, &packages.1)])?;
        let triple = self.triple().replace('-', "_");
        Ok(vec![
            (format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase()), compiler.clone()),
            (format!("CC_{triple}"), compiler),
            (format!("AR_{triple}"), format!("{gnu}-ar")),
        ])
    }
}

/// Builds the images `REGISTRY/tulle-PART:TAG` for each architecture and prints how they are pushed.
pub fn run(registry: &str, tag: &str, architectures: &[Arch]) -> Result<()> {
    let target = std::env::current_exe()?;
    let target = target.ancestors().nth(3).context("xtask is not in a target folder of cargo")?;
    let mut archives = Vec::new();
    for arch in architectures {
        compile(*arch)?;
        for part in PARTS {
            let program = target.join(arch.triple()).join("release").join(format!("tulle-{part}"));
            let archive = target.join("images").join(format!("tulle-{part}-{tag}-{}.tar", arch.name()));
            let name = format!("{registry}/tulle-{part}:{tag}-{}", arch.name());
            image(&name, part, *arch, &program, &archive)?;
            archives.push((name, archive));
        }
    }
    say("\nto push them:");
    for (name, archive) in &archives {
        say(&format!("docker load -i {} && docker push {name}", archive.display()));
    }
    for part in PARTS {
        let name = format!("{registry}/tulle-{part}:{tag}");
        let each: Vec<String> = architectures.iter().map(|arch| format!("{name}-{}", arch.name())).collect();
        say(&format!("docker manifest create {name} {} && docker manifest push {name}", each.join(" ")));
    }
    Ok(())
}

fn compile(arch: Arch) -> Result<()> {
    let triple = arch.triple();
    let mut cross = arch.cross()?;
    if arch == Arch::Arm64 {
        // Kernels for 64-bit ARM have pages of 4, 16 or 64 KiB; jemalloc runs on pages up to what it was built for.
        cross.push(("JEMALLOC_SYS_WITH_LG_PAGE".to_owned(), "16".to_owned()));
    }
    standard_library(&triple)?;
    let mut arguments = vec!["build", "--locked", "--release", "--target", &triple, "--bins"];
    let packages = PARTS.map(|part| format!("tulle-{part}"));
    packages.iter().for_each(|package| arguments.extend(["--package", package]));
    build::cargo_with(
        host::workspace(),
        &format!("compiling operator, webhook and sidecar for {}", arch.name()),
        &arguments,
        &cross,
    )
    .map(drop)
}

/// Makes sure that Rust's standard library for a target is there, installed by rustup if need be.
fn standard_library(triple: &str) -> Result<()> {
    let rustc = || Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let folder = host::output(rustc().args(["--print", "target-libdir", "--target", triple]))?;
    if PathBuf::from(folder.trim()).is_dir() {
        return Ok(());
    }
    step(&format!("rustup target add {triple}"));
    if let Err(error) = host::output(Command::new("rustup").args(["target", "add", triple])) {
        bail!(
            "Rust's standard library for {triple} is missing; install it with: rustup target add {triple}\n{error:#}"
        );
    }
    Ok(())
}

fn image(name: &str, part: &str, arch: Arch, program: &Path, archive: &Path) -> Result<()> {
    std::fs::create_dir_all(archive.parent().context("the archive's path has no folder")?)?;
    images::ensure_static(program)?;
    // As the image of the embedded cluster.
    let may_net_raw =
        images::TULLE.iter().any(|image| image.package == format!("tulle-{part}") && image.may_net_raw);
    step(&format!("building image {name} for {}", arch.name()));
    archive::write(
        name,
        Content { architecture: arch.name(), program: Some(program), may_net_raw },
        archive,
    )?;
    let size = std::fs::metadata(archive)?.len() as f64 / 1e6;
    say(&format!("{name}: {size:.2} MB"));
    Ok(())
}
