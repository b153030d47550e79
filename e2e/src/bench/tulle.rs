//! Two of Tulle's sidecars, with redirect rules as in a pod.

use std::fs;
use std::path::Path;
use std::process::Child;

use anyhow::{Result, bail};

use super::proxies::Programs;
use super::redirect::SERVICE;
use super::testbed::{CLIENT, SERVER, Testbed};
use crate::host;

/// Whether the sidecars count requests and report them to the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Telemetry {
    /// As in every pod.
    On,
    /// Neither, to measure what it costs.
    Off,
}

/// Starts the control plane and installs the redirect rules.
pub fn prepare(testbed: &Testbed, programs: &Programs) -> Result<Vec<Child>> {
    let folder = testbed.folder.display().to_string();
    let control = programs.control.display().to_string();
    let listen = format!("{}:26160", SERVER.1);
    let arguments = [
        "--listen",
        &listen,
        "--folder",
        &folder,
        "--client",
        CLIENT.1,
        "--server",
        SERVER.1,
        "--service",
        SERVICE,
    ];
    let control = testbed.start(SERVER.0, &control, &arguments)?;
    wait_for_file(&testbed.folder.join("server.crt"))?;
    fs::write(testbed.folder.join("token"), "none")?;
    let sidecar = programs.sidecar.display().to_string();
    for (namespace, _) in [CLIENT, SERVER] {
        let init = ["init", "--skip-inbound-ports=26160"];
        host::output(testbed.inside(namespace, &sidecar).args(init))?;
    }
    Ok(vec![control])
}

/// Starts the sidecar of a namespace.
pub fn start(
    testbed: &Testbed,
    programs: &Programs,
    namespace: (&str, &str),
    telemetry: Telemetry,
) -> Result<Child> {
    let folder = testbed.folder.display().to_string();
    let uid = if namespace == CLIENT { "client" } else { "server" };
    let environment = [
        ("TULLE_POD_NAME", uid.to_owned()),
        ("TULLE_POD_NAMESPACE", "bench".to_owned()),
        ("TULLE_POD_UID", uid.to_owned()),
        ("TULLE_POD_IPS", namespace.1.to_owned()),
        ("TULLE_TRUST_DOMAIN", "cluster.local".to_owned()),
        ("TULLE_OPERATOR", format!("{}:26160", SERVER.1)),
        ("TULLE_OPERATOR_IDENTITY", "tulle-system/tulle-operator".to_owned()),
        ("TULLE_TOKEN_FILE", format!("{folder}/token")),
        ("TULLE_TRUST_FILE", format!("{folder}/roots.pem")),
        ("TULLE_LOG", "warn".to_owned()),
        ("TULLE_TELEMETRY", if telemetry == Telemetry::On { "on" } else { "off" }.to_owned()),
    ];
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(testbed.folder.join(format!("{uid}-tulle.log")))?;
    let mut command = testbed.inside(namespace.0, "setpriv");
    command.args(["--reuid=4150", "--regid=4150", "--clear-groups"]).args(&programs.sidecar_runner);
    command.arg(&programs.sidecar).arg("proxy");
    Ok(command.envs(environment).stdout(log.try_clone()?).stderr(log).spawn()?)
}

fn wait_for_file(path: &Path) -> Result<()> {
    for _ in 0..100 {
        if path.exists() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    bail!("{} was not created within 10 s; see the log of tulle-bench in the same folder", path.display())
}
