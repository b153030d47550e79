//! The sidecar of an earlier commit, for tests with two versions in one mesh.
//!
//! In: the history of this clone. Out: an image of that commit's sidecar, made once per machine and kept in the cache
//! by its commit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::build::cargo_with;
use crate::host;
use crate::images;

/// The last commit before the sidecar's ports and the webhook's probes of it changed: what a mesh runs that is upgraded
/// from there.
const COMMIT: &str = "2bfbb5381ddbabc6eade476a2fb66b6dab5d7404";

/// The image's name.
pub const IMAGE: &str = "tulle.local/sidecar:earlier";

/// Settings of today's release profile that the commit does not have. With them every dependency is the one that is
/// compiled already for today's sidecar.
const PROFILE: &[&str] = &[
    "--config=profile.release.package.nlink.opt-level=1",
    "--config=profile.release.package.nlink.codegen-units=16",
];

/// The archive of the image, made now unless the cache holds it; `None` where this clone lacks the commit.
pub fn sidecar() -> Result<Option<PathBuf>> {
    let archive = images::place(IMAGE, COMMIT)?;
    if archive.is_file() {
        return Ok(Some(archive));
    }
    let commit = format!("{COMMIT}^{{commit}}");
    if host::output(git().args(["cat-file", "-e", &commit])).is_err() {
        return Ok(None);
    }
    let folder = host::cache()?.join(format!("earlier-{COMMIT}"));
    let program = compile(&folder)?;
    images::pack(IMAGE, Some(&program), &archive)?;
    fs::remove_dir_all(&folder)?;
    Ok(Some(archive))
}

fn git() -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(host::workspace());
    git
}

/// Compiles the commit's sidecar in a folder of its own; returns the program.
fn compile(folder: &Path) -> Result<PathBuf> {
    let (packed, source, target) = (folder.join("src.tar"), folder.join("src"), folder.join("target"));
    fs::create_dir_all(&source).with_context(|| format!("cannot create {}", source.display()))?;
    host::output(git().arg("archive").arg("--output").arg(&packed).arg(COMMIT))?;
    host::output(Command::new("tar").arg("-xf").arg(&packed).arg("-C").arg(&source))?;
    host::install_packages(host::TOOLCHAIN)?;
    // target/TRIPLE/PROFILE/xtask
    let xtask = std::env::current_exe()?;
    let mut folders = xtask.ancestors().skip(2);
    let triple = folders.next().and_then(Path::file_name).context("cargo's folder of the target")?;
    let shared = folders.next().context("cargo's folder")?;
    let arguments = ["build", "--locked", "--release", "--bins", "--package", "tulle-sidecar"];
    // The dependencies are shared, and the program is not: today's has the same name.
    let variables = [("CARGO_BUILD_BUILD_DIR", shared), ("CARGO_TARGET_DIR", target.as_path())]
        .map(|(name, folder)| (name.to_owned(), folder.display().to_string()));
    let name = "compiling the sidecar of an earlier commit";
    cargo_with(&source, name, &[&arguments, PROFILE].concat(), &variables)?;
    Ok(target.join(triple).join("release/tulle-sidecar"))
}
