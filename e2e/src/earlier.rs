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

/// The last commit before the sidecar's ports and its container's probes changed. A mesh that is upgraded
/// from there runs such sidecars.
const COMMIT: &str = "2bfbb5381ddbabc6eade476a2fb66b6dab5d7404";

/// The image's name.
pub const IMAGE: &str = "tulle.local/sidecar:earlier";

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
    images::pack(IMAGE, Some(&program), false, &archive)?;
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
    // In a shared folder, cargo confuses packages of the same name and version at the same place in their
    // workspaces. Unoptimised, because nothing is measured with it.
    let variables = [("CARGO_TARGET_DIR".to_owned(), target.display().to_string())];
    let arguments = ["build", "--locked", "--bins", "--package", "tulle-sidecar"];
    cargo_with(&source, "compiling the sidecar of an earlier commit (once)", &arguments, &variables)?;
    let xtask = std::env::current_exe()?;
    let triple = xtask
        .ancestors()
        .nth(2)
        .and_then(Path::file_name)
        .context("xtask is not in a target folder of cargo")?;
    let (built, stripped) = (target.join(triple).join("debug/tulle-sidecar"), folder.join("tulle-sidecar"));
    host::output(Command::new("strip").arg("-o").arg(&stripped).arg(&built))?;
    Ok(stripped)
}
