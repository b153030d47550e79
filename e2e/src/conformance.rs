//! `cargo xtask conformance`: the official conformance suite of the Gateway API, unmodified, against Tulle.
//!
//! In: the suite and its application, compiled from the modules that `e2e/conformance/go.mod` and
//! `e2e/conformance/echo/go.mod` name, and a cluster with Tulle. Out: the suite's own report. Fails unless every test of
//! a mesh has run and passed. `--update` checks the report in, as the suite wrote it.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use serde_yaml::Value;

use crate::archive::{self, File};
use crate::build;
use crate::cluster;
use crate::gateway;
use crate::host;
use crate::images;
use crate::install;
use crate::kubectl::Kube;
use crate::progress::{say, step, task};

/// Profiles of the suite, with the number of tests that each counts: core, extended.
const PROFILES: [(&str, u64, u64); 2] = [("MESH-HTTP", 7, 7), ("MESH-GRPC", 2, 0)];

/// Every feature of a mesh that the suite has a test for.
const FEATURES: &[&str] = &[
    "Mesh",
    "HTTPRoute",
    "GRPCRoute",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
];

/// Tests of a mesh in the suite, also those that count in no profile.
const MESH_TESTS: usize = 22;

/// Namespaces of the suite.
const NAMESPACES: [&str; 2] = ["gateway-conformance-mesh", "gateway-conformance-mesh-consumer"];

/// Name of the report that is checked in.
const REPORT: &str = "e2e/conformance/report.yaml";

/// Builds what is needed, installs Tulle, and runs the suite. `update`: writes the report of a run without failures into
/// the clone.
pub fn run(cluster: &str, update: bool, keep: bool) -> Result<()> {
    build::prepare(images::TULLE, cluster)?;
    prepare(cluster == "embedded")?;
    let _reserved = install::reserve(cluster)?;
    let kube = install::cluster(cluster)?;
    install::load_images(&kube)?;
    install::tulle(&kube)?;
    let outcome = passes(&kube);
    if let (Kube::Embedded(cluster), false) = (&kube, keep) {
        step("stopping the cluster");
        cluster.down()?;
    }
    let report = outcome?;
    if update {
        let to = host::workspace().join(REPORT);
        fs::copy(&report, &to).with_context(|| format!("cannot write {}", to.display()))?;
        say(&format!("wrote {REPORT}"));
    }
    Ok(())
}

/// Compiles the suite, and the application of its pods unless the cluster's nodes pull it.
pub fn prepare(with_application: bool) -> Result<()> {
    cluster::conformance()?;
    cluster::gateway_api()?;
    if with_application {
        cluster::echo("server")?;
        cluster::echo("client")?;
    }
    Ok(())
}

/// Runs the suite against Tulle, and fails unless every test of a mesh has run and passed. Returns the path of the
/// suite's report.
pub fn passes(kube: &Kube) -> Result<PathBuf> {
    let suite = cluster::conformance()?;
    install_needs(kube)?;
    for namespace in NAMESPACES {
        kube.run(&["delete", "namespace", namespace, "--ignore-not-found"])?;
    }
    let folder = host::cache()?.join("conformance");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let (report, log) = (folder.join("report.yaml"), folder.join("log"));
    if report.exists() {
        fs::remove_file(&report).with_context(|| format!("cannot remove {}", report.display()))?;
    }
    let tests = follow(&mut command(kube, &suite, &report)?, &log)?;
    let text = fs::read_to_string(&report)
        .with_context(|| format!("the suite wrote no report; its output is in {}", log.display()))?;
    let summary = summary(&text)?;
    summary.iter().for_each(|line| say(line));
    say(&format!("{} of {MESH_TESTS} tests of a mesh passed", tests.passed.len()));
    ensure!(
        tests.succeeded && tests.bad.is_empty() && tests.passed.len() >= MESH_TESTS,
        "not every test of a mesh passed: {:?}; the suite's output is in {}",
        tests.bad,
        log.display()
    );
    complete(&text)?;
    Ok(report)
}

/// Installs what the suite's objects need: the definitions of routes, and the image of its pods.
pub fn install_needs(kube: &Kube) -> Result<()> {
    gateway::install(kube)?;
    // On other clusters the nodes pull the image.
    match kube {
        Kube::Embedded(_) => install::load(kube, &application()?),
        Kube::Context(_) => Ok(()),
    }
}

/// The command that runs the suite.
fn command(kube: &Kube, suite: &Path, report: &Path) -> Result<Command> {
    let suite = suite.display().to_string();
    let mut command = match kube {
        Kube::Embedded(cluster) => cluster.inside(&suite)?,
        Kube::Context(name) => {
            let mut command = Command::new(&suite);
            command.env("KUBECONFIG", kubeconfig(name)?);
            command
        }
    };
    let profiles = PROFILES.map(|(name, ..)| name).join(",");
    command.args(["-test.run=TestConformance", "-test.v", "-test.timeout=30m"]);
    command.args([
        format!("--conformance-profiles={profiles}"),
        format!("--supported-features={}", FEATURES.join(",")),
        "--namespace-labels=tulle.dev/inject=enabled".to_owned(),
        "--organization=tulle".to_owned(),
        "--project=tulle".to_owned(),
        "--url=https://tulle.dev".to_owned(),
        format!("--version={}", env!("CARGO_PKG_VERSION")),
        "--contact=@tulle/maintainers".to_owned(),
        format!("--report-output={}", report.display()),
    ]);
    Ok(command)
}

/// A file with the context as the only one, because the suite uses the current context. Readable by its owner only: it
/// holds credentials.
fn kubeconfig(context: &str) -> Result<PathBuf> {
    let text = host::output(Command::new("kubectl").args([
        "config",
        "view",
        "--raw",
        "--minify",
        "--flatten",
        "--context",
        context,
    ]))?;
    let path = host::cache()?.join("conformance/kubeconfig");
    fs::create_dir_all(path.parent().context("the cache is a folder")?)?;
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    file.write_all(text.as_bytes())?;
    Ok(path)
}

/// Outcomes of the tests of a mesh, by their names.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tests {
    passed: Vec<String>,
    /// With how each ended.
    bad: Vec<String>,
    /// Whether the suite ended without an error, also in its preparation and at its end.
    succeeded: bool,
}

impl Tests {
    /// Reads a line of the output of `go test`. Returns the name of a test that begins.
    fn read(&mut self, line: &str) -> Option<String> {
        let line = line.trim_start();
        let name = |of: &str| {
            let test = of.split_whitespace().next()?.strip_prefix("TestConformance/")?;
            // Parts of a test follow behind another slash; tests of gateways are skipped by design.
            (!test.contains('/') && test.starts_with("Mesh")).then(|| test.to_owned())
        };
        if let Some(rest) = line.strip_prefix("=== RUN ") {
            return name(rest);
        }
        let rest = line.strip_prefix("--- ")?;
        let (result, rest) = rest.split_once(": ")?;
        let test = name(rest)?;
        match result {
            "PASS" => self.passed.push(test),
            other => self.bad.push(format!("{test} {other}")),
        }
        None
    }
}

/// Runs the suite, and shows which test it is in. All of its output goes to `log`.
fn follow(command: &mut Command, log: &Path) -> Result<Tests> {
    let task = task("the conformance suite of the Gateway API");
    let mut log_file = fs::File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log_file.try_clone()?);
    let mut child = piped.spawn().context("cannot run the conformance suite")?;
    let output = child.stdout.take().context("the suite has no standard output")?;
    let mut tests = Tests::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        log_file.write_all(&[line.as_slice(), b"\n"].concat())?;
        if let Some(name) = tests.read(&String::from_utf8_lossy(&line)) {
            task.report(&format!("{} passed, now {name}", tests.passed.len()));
        }
    }
    tests.succeeded = child.wait()?.success();
    Ok(tests)
}

/// A line for each profile of a report.
fn summary(report: &str) -> Result<Vec<String>> {
    let report: Value = serde_yaml::from_str(report).context("the suite's report is not YAML")?;
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let mut lines = vec![format!(
        "Gateway API {}, channel {}:",
        text(&report["gatewayAPIVersion"]),
        text(&report["gatewayAPIChannel"])
    )];
    for profile in report["profiles"].as_sequence().into_iter().flatten() {
        let passed = |level: &str| profile[level]["statistics"]["Passed"].as_u64().unwrap_or(0);
        lines.push(format!(
            "  {}: {} core and {} extended tests passed. {}",
            text(&profile["name"]),
            passed("core"),
            passed("extended"),
            text(&profile["summary"])
        ));
    }
    let provisional = report["succeededProvisionalTests"].as_sequence().map_or(0, Vec::len);
    lines.push(format!("  {provisional} provisional tests passed"));
    Ok(lines)
}

/// Fails unless a report has every profile with all of its tests, none of which failed or was skipped.
fn complete(report: &str) -> Result<()> {
    let report: Value = serde_yaml::from_str(report).context("the suite's report is not YAML")?;
    for (name, core, extended) in PROFILES {
        let mut profiles = report["profiles"].as_sequence().into_iter().flatten();
        let Some(profile) = profiles.find(|profile| profile["name"].as_str() == Some(name)) else {
            bail!("the suite's report has no profile {name}");
        };
        for (level, expected) in [("core", core), ("extended", extended)] {
            let found = &profile[level];
            // A profile without extended tests has no such part.
            if expected == 0 && found.is_null() {
                continue;
            }
            let of = |what: &str| found["statistics"][what].as_u64();
            ensure!(
                found["result"].as_str() == Some("success")
                    && of("Passed") >= Some(expected)
                    && of("Failed") == Some(0)
                    && of("Skipped") == Some(0),
                "{level} tests of {name}: expected at least {expected} passed, none failed or skipped, found {found:?}"
            );
        }
        let missing = &profile["extended"]["unsupportedFeatures"];
        ensure!(missing.is_null(), "{name}: features that the run did not claim: {missing:?}");
    }
    Ok(())
}

/// The archive of the application's image, under the name that the suite's manifests use, made now unless the cache holds
/// it.
fn application() -> Result<PathBuf> {
    let (server, client) = (cluster::echo("server")?, cluster::echo("client")?);
    let name = cluster::gateway_api()?.image;
    let key = host::content_key(&[&server, &client], &format!("{name} {}", archive::FORMAT))?;
    let place = images::place(&name, &key)?;
    if place.is_file() {
        return Ok(place);
    }
    fs::create_dir_all(place.parent().context("the cache is a folder")?)?;
    step(&format!("building image {name}"));
    // It does not start without a certificate of its own; the suite's clients do not check it.
    let pair = rcgen::generate_simple_self_signed(["echo".to_owned()])?;
    let (certificate, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let (server, client) = (read(&server)?, read(&client)?);
    let files = [
        File { path: "usr/local/bin/server", mode: 0o755, content: &server },
        File { path: "usr/local/bin/client", mode: 0o755, content: &client },
        File { path: "cert.crt", mode: 0o644, content: certificate.as_bytes() },
        File { path: "cert.key", mode: 0o644, content: key.as_bytes() },
    ];
    let run = json!({"Env": ["PATH=/usr/local/bin"], "Entrypoint": ["/usr/local/bin/server"]});
    archive::write_files(&name, images::architecture(), &files, &run, &place)?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(output: &str) -> Tests {
        let mut tests = Tests::default();
        output.lines().for_each(|line| drop(tests.read(line)));
        tests
    }

    #[test]
    fn a_test_of_a_mesh_counts_once_and_its_parts_and_those_of_gateways_do_not() {
        let output = "=== RUN   TestConformance/MeshBasic
    --- PASS: TestConformance/MeshBasic (2.01s)
        --- PASS: TestConformance/MeshBasic/0_request (1.00s)
    --- SKIP: TestConformance/GatewayWithAttachedRoutes (0.00s)
    --- SKIP: TestConformance/MeshPorts (0.00s)
    --- FAIL: TestConformance/MeshTrafficSplit (31.00s)";
        let tests = read(output);
        assert_eq!(tests.passed, ["MeshBasic"]);
        assert_eq!(tests.bad, ["MeshPorts SKIP", "MeshTrafficSplit FAIL"]);
        assert_eq!(
            Tests::default().read("=== RUN   TestConformance/MeshBasic").as_deref(),
            Some("MeshBasic")
        );
    }

    /// A report with so many passed, failed and skipped core tests of MESH-HTTP.
    fn report(passed: u32, failed: u32, skipped: u32) -> String {
        let status = |passed: u32, failed: u32, skipped: u32| {
            json!({"result": if failed > 0 { "failure" } else if skipped > 0 { "partial" } else { "success" },
                "statistics": {"Passed": passed, "Failed": failed, "Skipped": skipped}})
        };
        json!({"gatewayAPIVersion": "v1.6.3", "gatewayAPIChannel": "standard", "profiles": [
            {"name": "MESH-HTTP", "summary": "s", "core": status(passed, failed, skipped), "extended": status(7, 0, 0)},
            {"name": "MESH-GRPC", "summary": "s", "core": status(2, 0, 0)},
        ]})
        .to_string()
    }

    #[test]
    fn a_report_is_complete_only_if_nothing_failed_was_skipped_or_is_missing() {
        complete(&report(7, 0, 0)).unwrap();
        assert!(complete(&report(6, 1, 0)).is_err());
        assert!(complete(&report(6, 0, 1)).is_err());
        assert!(complete(&report(6, 0, 0)).is_err());
        let without = report(7, 0, 0).replace("MESH-GRPC", "OTHER");
        assert!(complete(&without).unwrap_err().to_string().contains("MESH-GRPC"));
        let lacking =
            report(7, 0, 0).replace(r#""extended":{"#, r#""extended":{"unsupportedFeatures":["X"],"#);
        assert!(complete(&lacking).is_err());
    }

    #[test]
    fn the_summary_names_version_and_profiles() {
        let lines = summary(&report(7, 0, 0)).unwrap();
        assert_eq!(lines[0], "Gateway API v1.6.3, channel standard:");
        assert_eq!(lines[1], "  MESH-HTTP: 7 core and 7 extended tests passed. s");
    }
}
