//! The component binary: upstream's programs compiled from their Go modules, once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host;
use crate::progress::step;

/// The Kubernetes release; `go.mod` pins the same.
const KUBERNETES: &str = "1.34.4";

/// The path of the component binary, built now unless the cache holds it.
pub fn binary() -> Result<PathBuf> {
    let source = host::workspace().join("e2e/cluster/components");
    let files = ["go.mod", "go.sum", "main.go"].map(|name| source.join(name));
    let flags = ldflags()?;
    let key = host::content_key(&files.each_ref().map(PathBuf::as_path), &flags)?;
    let binary = host::cache()?.join(format!("components-{key}"));
    if binary.is_file() {
        return Ok(binary);
    }
    let version = host::output(Command::new("go").arg("version")).unwrap_or_default();
    if !knows_toolchains(&version) {
        let found = if version.is_empty() { "there is none" } else { version.trim() };
        bail!(
            "the cluster's components are compiled from Go modules: install Go 1.24 or newer and try again ({found})"
        );
    }
    step("compiling Kubernetes, etcd and CoreDNS from their Go modules (about 5 minutes, once)");
    let half = binary.with_extension("half");
    let arguments = ["build", "-trimpath", "-ldflags", &flags, "-o"];
    host::output(
        Command::new("go").current_dir(&source).env("CGO_ENABLED", "0").args(arguments).arg(&half).arg("."),
    )
    .context("compiling the cluster's components")?;
    fs::rename(&half, &binary)?;
    Ok(binary)
}

/// Whether this Go compiles the modules, or fetches the one that does, as it can since 1.21.
fn knows_toolchains(version: &str) -> bool {
    let minor = version.split("go1.").nth(1).and_then(|rest| rest.split(['.', ' ']).next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_some_and(|minor| minor >= 21)
}

/// Linker flags: no symbols, and the version that the API server reports.
fn ldflags() -> Result<String> {
    let (major, rest) = KUBERNETES.split_once('.').context("a version has dots")?;
    let minor = rest.split('.').next().context("a version has a minor part")?;
    let version = "k8s.io/component-base/version";
    Ok(format!(
        "-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
    ))
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
