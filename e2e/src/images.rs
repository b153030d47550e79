//! Container images: binaries of this workspace, FROM scratch, built with docker or buildah.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::host;
use crate::progress::step;

/// An image and the program in it.
pub struct Image {
    /// Its name with tag.
    pub name: &'static str,
    /// The cargo package.
    pub package: &'static str,
    /// The program; `None`: an empty image.
    pub binary: Option<&'static str>,
}

/// Holds a pod's namespaces.
pub const PAUSE: Image = Image { name: "tulle.local/pause:1", package: "tulle-e2e", binary: Some("pause") };
/// Nothing: pods that mount the host's programs.
pub const EMPTY: Image = Image { name: "tulle.local/empty:1", package: "tulle-e2e", binary: None };
/// Tulle's own images, and the sample shop.
pub const TULLE: &[Image] = &[
    Image { name: "tulle.local/operator:dev", package: "tulle-operator", binary: Some("tulle-operator") },
    Image { name: "tulle.local/webhook:dev", package: "tulle-webhook", binary: Some("tulle-webhook") },
    Image { name: "tulle.local/sidecar:dev", package: "tulle-sidecar", binary: Some("tulle-sidecar") },
    Image { name: "tulle.local/shop:dev", package: "tulle-e2e", binary: Some("shop") },
];

/// Archives of an image that stay in the cache.
const KEPT: usize = 4;

/// The cargo profile of the images: `release`, or what TULLE_PROFILE names (`dev` builds faster).
pub fn profile() -> String {
    std::env::var("TULLE_PROFILE").unwrap_or_else(|_| "release".to_owned())
}

/// Builds the programs of all images with one cargo call.
pub fn compile(images: &[Image]) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(host::workspace()).args(["build", "--quiet", "--locked", "--profile", &profile()]);
    for image in images {
        if let Some(binary) = image.binary {
            cargo.args(["--package", image.package, "--bin", binary]);
        }
    }
    host::install_packages(host::TOOLCHAIN)?;
    step(&format!("compiling the images' programs (profile {})", profile()));
    host::output(&mut cargo).map(drop)
}

/// The image's archive, made now unless the cache holds one of the same content.
pub fn archive(image: &Image) -> Result<PathBuf> {
    let short = image.name.rsplit('/').next().unwrap_or(image.name).replace(':', "-");
    let dockerfile = host::workspace()
        .join(format!("e2e/images/Dockerfile.{}", if image.binary.is_some() { "program" } else { "empty" }));
    let mut files = vec![dockerfile.clone()];
    if let Some(binary) = image.binary {
        let program = program(image, binary)?;
        files.push(program);
    }
    let key = host::content_key(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>(), image.name)?;
    let archive = host::cache()?.join("images").join(format!("{short}-{key}.tar"));
    if !archive.is_file() {
        fs::create_dir_all(archive.parent().context("the cache is a folder")?)?;
        build(image, &dockerfile, files.get(1).map(PathBuf::as_path), &archive)?;
        forget_old(&archive, &short);
    }
    Ok(archive)
}

/// Keeps the newest archives of an image: every build of a changed program makes another one.
fn forget_old(newest: &Path, short: &str) {
    let entries =
        newest.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let mine = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{short}-")));
    let mut archives: Vec<_> =
        mine.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    archives.sort_by(|a, b| b.cmp(a));
    archives.iter().skip(KEPT).for_each(|(_, path)| drop(fs::remove_file(path)));
}

fn program(image: &Image, binary: &str) -> Result<PathBuf> {
    if image.package == PAUSE.package && binary == "pause" {
        let mine = std::env::current_exe()?.with_file_name("pause");
        if !mine.is_file() {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            cargo.current_dir(host::workspace()).args([
                "build",
                "--quiet",
                "--package",
                "tulle-e2e",
                "--bin",
                "pause",
            ]);
            host::output(&mut cargo)?;
        }
        return Ok(mine);
    }
    let folder = if profile() == "dev" { "debug".to_owned() } else { profile() };
    let mine = std::env::current_exe()?;
    let target = mine.parent().and_then(Path::parent).context("cargo's folder of programs")?;
    let built = target.join(folder).join(binary);
    let stripped = target.join("stripped").join(binary);
    fs::create_dir_all(target.join("stripped"))?;
    host::output(Command::new("strip").arg("-o").arg(&stripped).arg(&built))?;
    Ok(stripped)
}

fn build(image: &Image, dockerfile: &Path, program: Option<&Path>, archive: &Path) -> Result<()> {
    step(&format!("building image {}", image.name));
    let half = archive.with_extension("half");
    let context = archive.with_extension("context");
    fs::create_dir_all(&context)?;
    if let Some(program) = program {
        fs::copy(program, context.join("program"))?;
    }
    fs::remove_file(&half).ok();
    let name = image.name;
    if Command::new("docker").arg("info").output().is_ok_and(|done| done.status.success()) {
        host::output(
            Command::new("docker").args(["build", "-q", "-t", name, "-f"]).arg(dockerfile).arg(&context),
        )?;
        host::output(Command::new("docker").args(["save", name, "-o"]).arg(&half))?;
    } else {
        let storage = host::cache()?.join("buildah");
        let buildah = || {
            let mut command = Command::new("buildah");
            command
                .args(["--storage-driver", "vfs"])
                .arg("--root")
                .arg(&storage)
                .arg("--runroot")
                .arg(storage.join("run"));
            command
        };
        host::output(
            buildah()
                .args(["bud", "-q", "--isolation", "chroot", "--layers=false", "-t", name, "-f"])
                .arg(dockerfile)
                .arg(&context),
        )?;
        host::output(
            buildah().args(["push", "-q", name]).arg(format!("docker-archive:{}:{name}", half.display())),
        )?;
        host::output(buildah().args(["rmi", name])).ok();
    }
    fs::remove_dir_all(&context)?;
    fs::rename(&half, archive)?;
    Ok(())
}
