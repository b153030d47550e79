//! Upstream's programs, compiled from their Go modules, once: the component binary, and helm.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host;
use crate::progress::step;

/// The Kubernetes release; `go.mod` pins the same.
const KUBERNETES: &str = "1.34.4";

/// The Helm release; `go.mod` pins the same.
const HELM: &str = "3.19.5";

/// A program of a Go module in this repository.
struct GoProgram<'a> {
    /// What its name in the cache begins with.
    name: &'a str,
    /// The folder of `go.mod`.
    module: &'a str,
    /// The files that decide, with the linker's flags, whether the cache holds this program.
    files: &'a [&'a str],
    package: &'a str,
    ldflags: &'a str,
    /// Shown while it is compiled.
    step: &'a str,
}

/// The path of the component binary, built now unless the cache holds it.
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

/// The path of the real helm, built now unless the cache holds it.
pub fn helm() -> Result<PathBuf> {
    let (major, minor) = kubernetes()?;
    let package = "helm.sh/helm/v3";
    // As in Helm's Makefile: without, `helm template` and `helm lint` assume Kubernetes 1.20.
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

/// The path of a program, compiled now unless the cache holds it.
fn go_build(program: &GoProgram<'_>) -> Result<PathBuf> {
    let source = host::workspace().join(program.module);
    let files: Vec<PathBuf> = program.files.iter().map(|name| source.join(name)).collect();
    let key = host::content_key(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>(), program.ldflags)?;
    let binary = host::cache()?.join(format!("{}-{key}", program.name));
    if binary.is_file() {
        return Ok(binary);
    }
    let version = host::output(Command::new("go").arg("version")).unwrap_or_default();
    if !knows_toolchains(&version) {
        let found = if version.is_empty() { "there is none" } else { version.trim() };
        bail!(
            "{} is compiled from a Go module: install Go 1.24 or newer and try again ({found})",
            program.name
        );
    }
    step(program.step);
    let half = binary.with_extension("half");
    let mut go = Command::new("go");
    go.current_dir(&source).env("CGO_ENABLED", "0");
    go.args(["build", "-trimpath", "-ldflags", program.ldflags, "-o"]).arg(&half).arg(program.package);
    host::output(&mut go).with_context(|| format!("compiling {}", program.name))?;
    fs::rename(&half, &binary)?;
    Ok(binary)
}

/// Major and minor version of Kubernetes.
fn kubernetes() -> Result<(&'static str, &'static str)> {
    let mut parts = KUBERNETES.split('.');
    parts.next().zip(parts.next()).context("a version of Kubernetes has two dots")
}

/// Whether this Go compiles the modules, or fetches the one that does, as it can since 1.21.
fn knows_toolchains(version: &str) -> bool {
    let minor = version.split("go1.").nth(1).and_then(|rest| rest.split(['.', ' ']).next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_some_and(|minor| minor >= 21)
}

#[cfg(test)]
mod tests {
    use super::knows_toolchains;

    #[test]
    fn a_go_that_is_too_old_is_known_by_its_version() {
        assert!(knows_toolchains("go version go1.26.8 linux/amd64"));
        assert!(!knows_toolchains("go version go1.19 linux/amd64"));
        assert!(!knows_toolchains(""));
    }
}
