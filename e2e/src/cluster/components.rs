//! Compiles upstream programs from their Go modules, once: the component binary, helm, the conformance suite of the
//! Gateway API and the application that it tests with, a collector of traces, grpcurl, h2spec, and kstatus.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
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
    /// Whether the package is a test.
    test: bool,
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
        test: false,
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
        test: false,
        ldflags: &format!("-s -w -X {package}/internal/version.version=v{HELM} {}", assumed.join(" ")),
        step: "compiling helm from its Go module (once)",
    })
}

/// The Go module of the conformance suite.
const CONFORMANCE: &str = "e2e/conformance";

/// Path of the conformance suite of the Gateway API, which is built unless it is in the cache.
pub fn conformance() -> Result<PathBuf> {
    go_build(&GoProgram {
        name: "conformance",
        module: CONFORMANCE,
        files: &["go.mod", "go.sum", "conformance_test.go"],
        package: ".",
        test: true,
        ldflags: "-s -w",
        step: "compiling the conformance suite of the Gateway API (about 2 minutes, once)",
    })
}

/// Path of a program of the conformance suite's application, `client` or `server`, which is built unless it is in the
/// cache.
pub fn echo(program: &str) -> Result<PathBuf> {
    go_build(&GoProgram {
        name: &format!("echo-{program}"),
        module: &format!("{CONFORMANCE}/echo"),
        files: &["go.mod", "go.sum"],
        package: &format!("istio.io/istio/pkg/test/echo/cmd/{program}"),
        test: false,
        ldflags: "-s -w",
        step: &format!("compiling the {program} of the conformance suite's application (once)"),
    })
}

/// Path of a collector of traces with the receiver of the OpenTelemetry Collector, which is built unless it is in the
/// cache.
pub fn collector() -> Result<PathBuf> {
    go_build(&GoProgram {
        name: "collector",
        module: "e2e/collector",
        files: &["go.mod", "go.sum", "main.go"],
        package: ".",
        test: false,
        ldflags: "-s -w",
        step: "compiling the OTLP receiver of the OpenTelemetry Collector (about 1 minute, once)",
    })
}

/// Path of grpcurl, a client of gRPC, which is built unless it is in the cache.
pub fn grpcurl() -> Result<PathBuf> {
    go_build(&GoProgram {
        name: "grpcurl",
        module: "e2e/grpcurl",
        files: &["go.mod", "go.sum"],
        package: "github.com/fullstorydev/grpcurl/cmd/grpcurl",
        test: false,
        ldflags: "-s -w",
        step: "compiling grpcurl from its Go module (once)",
    })
}

/// Path of h2spec, a suite for servers of HTTP/2, which is built unless it is in the cache.
pub fn h2spec() -> Result<PathBuf> {
    go_build(&GoProgram {
        name: "h2spec",
        module: "e2e/h2spec",
        files: &["go.mod", "go.sum"],
        package: "github.com/summerwind/h2spec/cmd/h2spec",
        test: false,
        ldflags: "-s -w",
        step: "compiling h2spec from its Go module (once)",
    })
}

/// Path of a program that prints what kstatus computes of an object, which is built unless it is in the cache.
pub fn kstatus() -> Result<PathBuf> {
    go_build(&GoProgram {
        name: "kstatus",
        module: "e2e/kstatus",
        files: &["go.mod", "go.sum", "main.go"],
        package: ".",
        test: false,
        ldflags: "-s -w",
        step: "compiling kstatus from its Go module (once)",
    })
}

/// What the release of the Gateway API that the conformance suite tests contains besides programs.
pub struct GatewayApi {
    /// The CustomResourceDefinitions of the standard channel, and the admission policy that comes with them.
    pub definitions: String,
    /// The image of the suite's pods.
    pub image: String,
    /// The manifests of the namespaces, Services and pods that the suite's tests of a mesh share.
    pub mesh: String,
    /// The manifests of each test of a mesh that has some, by the names of their files.
    pub tests: BTreeMap<String, String>,
}

/// The files of the Gateway API, from its modules, or from the cache.
pub fn gateway_api() -> Result<GatewayApi> {
    let source = host::workspace().join(CONFORMANCE);
    let key = host::content_key(&[&source.join("go.mod"), &source.join("go.sum")], "definitions")?;
    let folder = host::cache()?.join(format!("gateway-api-{key}"));
    let (definitions, image) = (folder.join("definitions.yaml"), folder.join("image"));
    let (mesh, tests) = (folder.join("mesh.yaml"), folder.join("tests.json"));
    if [&definitions, &image, &mesh, &tests].iter().any(|file| !file.is_file()) {
        check_go("the conformance suite")?;
        let of_suite = module_folder("sigs.k8s.io/gateway-api/conformance")?;
        let manifests = read(&of_suite.join("mesh/manifests.yaml"))?;
        let names = manifests.lines().filter_map(|line| line.trim().strip_prefix("image: "));
        let mut names: Vec<&str> = names.collect();
        names.dedup();
        let [name] = names.as_slice() else {
            bail!("expected one image in the manifests of the conformance suite, found {names:?}");
        };
        host::write(&image, name)?;
        host::write(&mesh, &manifests)?;
        let mut of_tests = BTreeMap::new();
        for file in files(&of_suite.join("tests/mesh"))? {
            if file.extension().is_some_and(|extension| extension == "yaml") {
                let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                of_tests.insert(name, read(&file)?);
            }
        }
        host::write(&tests, serde_json::to_string(&of_tests)?)?;
        let standard = files(&module_folder("sigs.k8s.io/gateway-api")?.join("config/crd/standard"))?;
        let texts: Vec<String> = standard.iter().map(|file| read(file)).collect::<Result<_>>()?;
        host::write(&definitions, texts.join("\n---\n"))?;
    }
    Ok(GatewayApi {
        definitions: read(&definitions)?,
        image: read(&image)?,
        mesh: read(&mesh)?,
        tests: serde_json::from_str(&read(&tests)?)?,
    })
}

/// The files of a folder, by their names.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

/// The folder of a Go module on which the conformance suite depends.
fn module_folder(module: &str) -> Result<PathBuf> {
    let mut go = Command::new("go");
    go.current_dir(host::workspace().join(CONFORMANCE)).args(["mod", "download", "-json", module]);
    let found: serde_json::Value = serde_json::from_str(&host::output(&mut go)?)?;
    let folder = found["Dir"].as_str();
    Ok(PathBuf::from(folder.with_context(|| format!("go mod download names no folder of {module}"))?))
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
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
    packages.current_dir(&source).env("CGO_ENABLED", "0").args(["list", "-deps"]);
    if program.test {
        packages.arg("-test");
    }
    packages.arg(program.package);
    let mut fetched = 0;
    let all = host::output_with_progress(&mut packages, |line| {
        let downloads = line.starts_with("go: downloading");
        fetched += u32::from(downloads);
        task.report(&format!("{fetched} modules downloaded"));
        downloads
    })
    .with_context(|| format!("cannot list the packages of {}", program.name))?;
    let (all, mut done) = (all.lines().count(), 0);
    let half = binary.with_extension("half");
    let mut go = Command::new("go");
    go.current_dir(&source).env("CGO_ENABLED", "0");
    // `go test -v` prints nothing of the build, so its commands are printed instead.
    let verbose: &[&str] = if program.test { &["test", "-c", "-x"] } else { &["build", "-v"] };
    // A clone of another owner has no version that git would tell.
    go.args(verbose)
        .args(["-buildvcs=false", "-trimpath", "-ldflags", program.ldflags, "-o"])
        .arg(&half)
        .arg(program.package);
    host::output_with_progress(&mut go, |line| {
        done += usize::from(!program.test || line.contains("/compile -o "));
        task.report(&format!("{done} of {all} packages"));
        false
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
