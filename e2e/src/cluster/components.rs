//! Compiles upstream programs from their Go modules, once: the component binary, and helm.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host;
use crate::progress::task;

/// The Kubernetes release, as in `go.mod`.
const KUBERNETES: &str = "1.34.4";

/// The Helm release, as in `go.mod`.
const HELM: &str = "3.19.5";

/// A program of a Go module in this repository.
struct GoProgram<'a> {
    /// Prefix of the file name in the cache.
    name: &'a str,
    /// Folder of `go.mod`.
    module: &'a str,
    /// Files whose content, with the linker's flags, is the key in the cache.
    files: &'a [&'a str],
    package: &'a str,
    ldflags: &'a str,
    /// Shown while it is compiled.
    step: &'a str,
}

/// Path of the component binary, which is built unless it is in the cache.
pub fn binary() -> Result<PathBuf> {
    let (major, minor) = kubernetes()?;
    let version = "k8s.io/component-base/version";
    go_build(&GoProgram {
        name: "components",
        module: "e2e/cluster/components",
        files: &["go.mod", "go.sum", "main.go"],
        package: ".",
        // No symbols, and the version that the API server reports.
        ldflags: &format!(
            "-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
        ),
        step: "compiling Kubernetes, etcd and CoreDNS from their Go modules (about 5 minutes, once)",
    })
}

/// Fails at once where the component binary cannot be made.
pub fn check() -> Result<()> {
    check_go("components")
}

fn check_go(what: &str) -> Result<()> {
    let version = host::output(Command::new("go").arg("version")).unwrap_or_default();
    if !can_download_toolchain(&version) {
        let found = if version.is_empty() { "go was not found" } else { version.trim() };
        bail!(
            "{what} is compiled from a Go module, which needs Go 1.24 or newer ({found}); install it and try again"
        );
    }
    Ok(())
}

/// Installs the node's programs and builds the component binary.
pub fn prepare() -> Result<()> {
    host::install_programs()?;
    binary().map(drop)
}

/// Path of helm, which is built unless it is in the cache.
pub fn helm() -> Result<PathBuf> {
    let (major, minor) = kubernetes()?;
    let package = "helm.sh/helm/v3";
    // As in Helm's Makefile. Without these flags, `helm template` and `helm lint` assume Kubernetes 1.20.
    let assumed = ["chartutil", "lint/rules"].map(|user| {
        let version = format!("{package}/pkg/{user}.k8sVersion");
        format!("-X {version}Major={major} -X {version}Minor={minor}")
    });
    go_build(&GoProgram {
        name: "helm",
        module: "e2e/cluster/helm",
        files: &["go.mod", "go.sum"],
        package: &format!("{package}/cmd/helm"),
        ldflags: &format!("-s -w -X {package}/internal/version.version=v{HELM} {}", assumed.join(" ")),
        step: "compiling helm from its Go module (once)",
    })
}

/// Path of a program, which is compiled unless it is in the cache.
fn go_build(program: &GoProgram<'_>) -> Result<PathBuf> {
    let source = host::workspace().join(program.module);
    let files: Vec<PathBuf> = program.files.iter().map(|name| source.join(name)).collect();
    let key = host::content_key(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>(), program.ldflags)?;
    let binary = host::cache()?.join(format!("{}-{key}", program.name));
    if binary.is_file() {
        return Ok(binary);
    }
    check_go(program.name)?;
    let task = task(program.step);
    let mut packages = Command::new("go");
    packages.current_dir(&source).env("CGO_ENABLED", "0").args(["list", "-deps", program.package]);
    let mut fetched = 0;
    let all = host::output_with_progress(&mut packages, |line| {
        fetched += u32::from(line.starts_with("go: downloading"));
        task.report(&format!("{fetched} modules downloaded"));
    })
    .with_context(|| format!("cannot list the packages of {}", program.name))?;
    let (all, mut done) = (all.lines().count(), 0);
    let half = binary.with_extension("half");
    let mut go = Command::new("go");
    go.current_dir(&source).env("CGO_ENABLED", "0");
    // A clone of another owner has no version that git would tell.
    go.args(["build", "-v", "-buildvcs=false", "-trimpath", "-ldflags", program.ldflags, "-o"])
        .arg(&half)
        .arg(program.package);
    host::output_with_progress(&mut go, |_| {
        done += 1;
        task.report(&format!("{done} of {all} packages"));
    })
    .with_context(|| format!("cannot compile {}", program.name))?;
    fs::rename(&half, &binary)?;
    Ok(binary)
}

/// Major and minor version of Kubernetes.
fn kubernetes() -> Result<(&'static str, &'static str)> {
    let mut parts = KUBERNETES.split('.');
    parts.next().zip(parts.next()).context("KUBERNETES is not a version like 1.34.4")
}

/// Whether this Go can download the toolchain that `go.mod` requires: possible since 1.21.
fn can_download_toolchain(version: &str) -> bool {
    let minor = version.split("go1.").nth(1).and_then(|rest| rest.split(['.', ' ']).next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_some_and(|minor| minor >= 21)
}

#[cfg(test)]
mod tests {
    use super::can_download_toolchain;

    #[test]
    fn a_go_that_cannot_download_toolchains_is_recognised() {
        assert!(can_download_toolchain("go version go1.26.8 linux/amd64"));
        assert!(!can_download_toolchain("go version go1.19 linux/amd64"));
        assert!(!can_download_toolchain(""));
    }
}
