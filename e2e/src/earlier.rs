//! Programs of earlier commits, for tests with several versions in one mesh.
//!
//! In: the history of this clone. Out: images of those commits' programs, made once per machine and kept in the cache
//! by their commits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::build::cargo_with;
use crate::host;
use crate::images;

/// An earlier commit, and the images that are made of it.
pub struct Build {
    commit: &'static str,
    /// The image of its sidecar.
    pub sidecar: &'static str,
    /// The image of its operator, where one is made.
    pub operator: Option<&'static str>,
    /// Whether its sidecar listens on the ports that sidecars had before they changed, and is not probed once it has
    /// started.
    pub has_former_ports: bool,
}

/// The wire version before today's: small resources, routes and limits, and an operator that knows no access logs, no taps
/// and no series in reports.
pub const PREVIOUS: Build = Build {
    commit: "e9acbc7434fd69b669f5e055a17396396343573f",
    sidecar: "tulle.local/sidecar:previous",
    operator: Some("tulle.local/operator:previous"),
    has_former_ports: false,
};

/// The wire version before that of [`PREVIOUS`]: one resource for all that a pod enforces, and one for each address. Its
/// operator cannot serve today's sidecars, which do not ask for these.
pub const OLDEST: Build = Build {
    commit: "2bfbb5381ddbabc6eade476a2fb66b6dab5d7404",
    sidecar: "tulle.local/sidecar:oldest",
    operator: None,
    has_former_ports: true,
};

impl Build {
    /// Its images, each with the program in it.
    fn images(&self) -> Vec<(&'static str, &'static str)> {
        let mut images = vec![(self.sidecar, "tulle-sidecar")];
        images.extend(self.operator.map(|image| (image, "tulle-operator")));
        images
    }

    /// Whether this clone has the commit.
    fn is_here(&self) -> bool {
        let commit = format!("{}^{{commit}}", self.commit);
        host::output(git().args(["cat-file", "-e", &commit])).is_ok()
    }
}

/// The archives of all images, made now unless the cache holds them; `None` where this clone lacks a commit.
pub fn archives() -> Result<Option<Vec<PathBuf>>> {
    let folder = host::cache()?.join("earlier");
    let mut archives = Vec::new();
    for build in [&PREVIOUS, &OLDEST] {
        let places = build.images().into_iter().map(|(image, _)| images::place(image, build.commit));
        let places = places.collect::<Result<Vec<PathBuf>>>()?;
        if !places.iter().all(|archive| archive.is_file()) {
            if !build.is_here() {
                return Ok(None);
            }
            make(build, &folder, &places)?;
        }
        archives.extend(places);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    Ok(Some(archives))
}

fn git() -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(host::workspace());
    git
}

/// Compiles the programs of a commit and packs them into these archives. Dependencies that another commit has too are
/// compiled once.
fn make(build: &Build, folder: &Path, archives: &[PathBuf]) -> Result<()> {
    let source = unpack(build, folder)?;
    host::install_packages(host::TOOLCHAIN)?;
    let target = folder.join("target");
    // Not this workspace's target folder: cargo takes packages of the same name, version and place in their workspace
    // for the same ones. Unoptimised and without what debuggers need, because nothing is measured with it.
    let variables = [
        ("CARGO_TARGET_DIR", target.display().to_string()),
        ("CARGO_INCREMENTAL", "0".to_owned()),
        ("CARGO_PROFILE_DEV_DEBUG", "0".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value));
    // Both packages, whichever programs are wanted: with one selection, the dependencies have the same features in all
    // commits.
    let made = build.images();
    let mut arguments =
        vec!["build", "--locked", "--package", "tulle-sidecar", "--package", "tulle-operator"];
    made.iter().for_each(|(_, program)| arguments.extend(["--bin", *program]));
    let commit: String = build.commit.chars().take(7).collect();
    cargo_with(&source, &format!("compiling commit {commit} (once)"), &arguments, &variables)?;
    let xtask = std::env::current_exe()?;
    let triple = xtask
        .ancestors()
        .nth(2)
        .and_then(Path::file_name)
        .context("xtask is not in a target folder of cargo")?;
    let programs = target.join(triple).join("debug");
    for ((image, program), archive) in made.iter().zip(archives) {
        let stripped = folder.join(program);
        host::output(Command::new("strip").arg("-o").arg(&stripped).arg(programs.join(program)))?;
        images::pack(image, Some(&stripped), false, archive)?;
    }
    Ok(())
}

/// Puts the files of a commit where those of the one before were; returns their folder.
fn unpack(build: &Build, folder: &Path) -> Result<PathBuf> {
    let (packed, source) = (folder.join("src.tar"), folder.join("src"));
    if source.exists() {
        fs::remove_dir_all(&source)?;
    }
    fs::create_dir_all(&source).with_context(|| format!("cannot create {}", source.display()))?;
    host::output(git().arg("archive").arg("--output").arg(&packed).arg(build.commit))?;
    // With the time of now (`-m`) instead of the commit's: cargo compiles anew what is newer than what it has compiled.
    host::output(Command::new("tar").arg("-xmf").arg(&packed).arg("-C").arg(&source))?;
    Ok(source)
}
