//! Builds the container images: each one program of this workspace and nothing else, so that there is nothing else to
//! patch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::archive::{self, Content};
use crate::build::cargo;
use crate::host;
use crate::progress::step;

/// A container image with one program.
pub struct Image {
    /// Name and tag.
    pub name: &'static str,
    /// Cargo package of the program.
    pub package: &'static str,
    /// Name of the program; `None` for an empty image.
    pub binary: Option<&'static str>,
    /// Cargo profile of the program, unless the variable TULLE_PROFILE is set.
    pub profile: &'static str,
    /// Whether the program may have CAP_NET_RAW, where its container is given it.
    pub may_net_raw: bool,
}

/// The sandbox image, whose process holds a pod's namespaces.
pub const PAUSE: Image = Image {
    name: "tulle.local/pause:1",
    package: "tulle-e2e",
    binary: Some("pause"),
    profile: "dev",
    may_net_raw: false,
};
/// An empty image, for pods that mount the host's programs.
pub const EMPTY: Image = Image {
    name: "tulle.local/empty:1",
    package: "tulle-e2e",
    binary: None,
    profile: "dev",
    may_net_raw: false,
};
/// Tulle's own images, and the sample shop. The sidecar has the release profile because the benchmark measures it;
/// optimising the control plane's dependencies would take most of the time of a first run.
pub const TULLE: &[Image] = &[
    Image {
        name: "tulle.local/sidecar:dev",
        package: "tulle-sidecar",
        binary: Some("tulle-sidecar"),
        profile: "release",
        may_net_raw: true,
    },
    Image {
        name: "tulle.local/operator:dev",
        package: "tulle-operator",
        binary: Some("tulle-operator"),
        profile: "dev",
        may_net_raw: false,
    },
    Image {
        name: "tulle.local/webhook:dev",
        package: "tulle-webhook",
        binary: Some("tulle-webhook"),
        profile: "dev",
        may_net_raw: false,
    },
    Image {
        name: "tulle.local/shop:dev",
        package: "tulle-shop",
        binary: Some("shop"),
        profile: "dev",
        may_net_raw: false,
    },
];

/// The package of `tulle`, the command line. It has no image, because people run it on their own machines. Whoever builds
/// the operator gets it too, with the same profile.
const CLI: &str = "tulle-cli";
/// The package of the operator, whose API it asks.
const OPERATOR: &str = "tulle-operator";

/// How many archives of an image stay in the cache.
const KEPT_ARCHIVES: usize = 4;

impl Image {
    /// Cargo profile of the program.
    pub fn profile(&self) -> String {
        std::env::var("TULLE_PROFILE").unwrap_or_else(|_| self.profile.to_owned())
    }

    /// Folder of the program below cargo's target directory.
    pub fn folder(&self) -> String {
        let profile = self.profile();
        if profile == "dev" { "debug".to_owned() } else { profile }
    }
}

/// Builds the programs of images, with one cargo call per profile.
///
/// With `with_tests`, it builds all packages of the workspace, as `cargo test --workspace` does. Cargo selects features
/// by the packages that it builds, so another selection would compile the dependencies a second time.
pub fn compile(images: &[Image], with_tests: bool) -> Result<()> {
    host::install_packages(host::TOOLCHAIN)?;
    let mut profiles: Vec<String> = Vec::new();
    for image in images.iter().filter(|image| image.binary.is_some()) {
        if !profiles.contains(&image.profile()) {
            profiles.push(image.profile());
        }
    }
    for profile in profiles {
        let its = images.iter().filter(|image| image.binary.is_some() && image.profile() == profile);
        let mut packages: Vec<&str> = its.map(|image| image.package).collect();
        if packages.contains(&OPERATOR) {
            packages.push(CLI);
        }
        let mut arguments = vec!["build", "--locked", "--profile", &profile];
        if with_tests && profile == "dev" {
            // Not this program: it would be replaced while it runs.
            arguments.extend(["--workspace", "--exclude", "tulle-e2e", "--all-targets"]);
        } else {
            arguments.push("--bins");
            packages.iter().for_each(|package| arguments.extend(["--package", package]));
        }
        let names: Vec<&str> = packages.iter().map(|package| package.trim_start_matches("tulle-")).collect();
        cargo(&format!("compiling {} (profile {profile})", names.join(", ")), &arguments)?;
    }
    Ok(())
}

/// Path of the image's archive, which is built unless the cache has one of the same content.
pub fn archive(image: &Image) -> Result<PathBuf> {
    let program = image.binary.map(|binary| program(image, binary)).transpose()?;
    let files: Vec<&Path> = program.as_deref().into_iter().collect();
    let key =
        host::content_key(&files, &format!("{} {} {}", image.name, image.may_net_raw, archive::FORMAT))?;
    let archive = place(image.name, &key)?;
    if !archive.is_file() {
        pack(image.name, program.as_deref(), image.may_net_raw, &archive)?;
    }
    Ok(archive)
}

/// Where the cache keeps the archive of an image. `key`: of its content.
pub fn place(name: &str, key: &str) -> Result<PathBuf> {
    Ok(host::cache()?.join("images").join(format!("{}-{key}.tar", short(name))))
}

/// Makes the archive of an image for this machine, with this program or empty. `may_net_raw`: see [`Image`].
pub fn pack(name: &str, program: Option<&Path>, may_net_raw: bool, archive: &Path) -> Result<()> {
    fs::create_dir_all(archive.parent().context("the cache is a folder")?)?;
    step(&format!("building image {name}"));
    archive::write(name, Content { architecture: architecture(), program, may_net_raw }, archive)?;
    remove_old_archives(archive, &short(name));
    Ok(())
}

/// The architecture of this machine, as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An image's name as a part of file names.
fn short(name: &str) -> String {
    name.rsplit('/').next().unwrap_or(name).replace(':', "-")
}

/// Removes old archives of an image, because every build of a changed program adds one.
fn remove_old_archives(newest: &Path, short: &str) {
    let entries =
        newest.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let mine = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{short}-")));
    let mut archives: Vec<_> =
        mine.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    archives.sort_by(|a, b| b.cmp(a));
    archives.iter().skip(KEPT_ARCHIVES).for_each(|(_, path)| drop(fs::remove_file(path)));
}

/// The program `tulle`, which [`compile`] has built with the operator.
pub fn tulle() -> Result<PathBuf> {
    let operator = TULLE.iter().find(|image| image.package == OPERATOR);
    let operator = operator.context("the list of images has no operator")?;
    let program = target()?.join(operator.folder()).join("tulle");
    if !program.is_file() {
        bail!("{} was not built", program.display());
    }
    Ok(program)
}

/// The directory in which cargo has a folder for each profile.
pub fn target() -> Result<PathBuf> {
    let mine = std::env::current_exe()?;
    let target = mine.parent().and_then(Path::parent);
    target.map(Path::to_path_buf).context("xtask is not in a target directory of cargo")
}

fn program(image: &Image, binary: &str) -> Result<PathBuf> {
    if image.package == PAUSE.package && binary == "pause" {
        let mine = std::env::current_exe()?.with_file_name("pause");
        if !mine.is_file() {
            cargo("compiling pause", &["build", "--locked", "--package", "tulle-e2e", "--bin", "pause"])?;
        }
        return Ok(mine);
    }
    let target = target()?;
    let built = target.join(image.folder()).join(binary);
    let stripped = target.join("stripped").join(binary);
    fs::create_dir_all(target.join("stripped"))?;
    host::output(Command::new("strip").arg("-o").arg(&stripped).arg(&built))?;
    ensure_static(&stripped)?;
    Ok(stripped)
}

/// Fails unless a program needs no other file to start, as in an image that has no other.
pub fn ensure_static(program: &Path) -> Result<()> {
    let headers = host::output(Command::new("readelf").arg("-lW").arg(program))?;
    if headers.contains("INTERP") {
        bail!(
            "{} is linked dynamically and would not start in its image; unset RUSTFLAGS, because it replaces the flags of .cargo/config.toml",
            program.display()
        );
    }
    Ok(())
}
