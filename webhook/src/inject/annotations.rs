//! Settings of the sidecar: annotations `tulle.dev/<name>` of the pod, then of its namespace, then MeshConfig.
//!
//! In: annotations. Out: [`PodSettings`], and a warning for each annotation that is unknown or invalid.

use std::collections::BTreeMap;

use tulle_crds::{SidecarDefaults, keys};

use crate::quantity::Quantity;

/// Whose address the application sees as that of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceAddress {
    /// The pod's own, from which the sidecar connects.
    Sidecar,
    /// The client's.
    Preserve,
}

/// Settings of a sidecar; a field that is empty or `None` is not set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSettings {
    /// Inbound ports that are not redirected to the sidecar.
    pub skip_inbound_ports: Vec<u16>,
    /// Outbound ports that are not redirected to the sidecar.
    pub skip_outbound_ports: Vec<u16>,
    /// Log level.
    pub log_level: Option<String>,
    /// Number of worker threads.
    pub workers: Option<u16>,
    /// Whose address the application sees.
    pub source_address: Option<SourceAddress>,
    /// CPU request.
    pub cpu: Option<String>,
    /// Memory request.
    pub memory: Option<String>,
    /// CPU limit.
    pub cpu_limit: Option<String>,
    /// Memory limit.
    pub memory_limit: Option<String>,
}

/// Known annotations, for the warning about unknown ones.
const KNOWN: &str = "skip-inbound-ports, skip-outbound-ports, source-address, log-level, workers, cpu, memory, cpu-limit, memory-limit";

impl PodSettings {
    /// Reads the annotations of an object; `object` names it in warnings.
    pub fn read<'a>(
        annotations: impl Iterator<Item = (&'a str, &'a str)>,
        object: &str,
        warnings: &mut Vec<String>,
    ) -> Self {
        let mut settings = Self::default();
        for (key, value) in annotations {
            let Some(name) = key.strip_prefix("tulle.dev/").filter(|_| key != keys::SEAL) else { continue };
            if let Err(why) = settings.set(name, value) {
                warnings.push(format!("annotation {key}{object} has no effect because {why}"));
            }
        }
        settings
    }

    /// The defaults of MeshConfig.
    pub fn of_mesh(defaults: &SidecarDefaults, warnings: &mut Vec<String>) -> Self {
        let mut read = |amounts: &BTreeMap<String, String>, kind: &str, name: &str| {
            let text = amounts.get(name)?;
            let known = quantity(text);
            if let Err(why) = &known {
                warnings.push(format!(
                    "spec.sidecar.resources.{kind}.{name} of MeshConfig mesh has no effect because {why}"
                ));
            }
            known.ok()
        };
        let resources = &defaults.resources;
        Self {
            cpu: read(&resources.requests, "requests", "cpu"),
            memory: read(&resources.requests, "requests", "memory"),
            cpu_limit: read(&resources.limits, "limits", "cpu"),
            memory_limit: read(&resources.limits, "limits", "memory"),
            ..Self::default()
        }
    }

    /// These settings, completed by `others` where they are not set.
    pub fn or(self, others: Self) -> Self {
        let ports = |mine: Vec<u16>, others| if mine.is_empty() { others } else { mine };
        Self {
            skip_inbound_ports: ports(self.skip_inbound_ports, others.skip_inbound_ports),
            skip_outbound_ports: ports(self.skip_outbound_ports, others.skip_outbound_ports),
            log_level: self.log_level.or(others.log_level),
            workers: self.workers.or(others.workers),
            source_address: self.source_address.or(others.source_address),
            cpu: self.cpu.or(others.cpu),
            memory: self.memory.or(others.memory),
            cpu_limit: self.cpu_limit.or(others.cpu_limit),
            memory_limit: self.memory_limit.or(others.memory_limit),
        }
    }

    /// Whether ports are excluded from redirection.
    pub fn skips_ports(&self) -> bool {
        !self.skip_inbound_ports.is_empty() || !self.skip_outbound_ports.is_empty()
    }

    /// Whether the application sees its clients' addresses.
    pub fn preserves_source_address(&self) -> bool {
        self.source_address == Some(SourceAddress::Preserve)
    }

    /// The request of a resource, `cpu` or `memory`.
    pub(super) fn request(&self, resource: &str) -> Option<&str> {
        match resource {
            "cpu" => self.cpu.as_deref(),
            "memory" => self.memory.as_deref(),
            _ => None,
        }
    }

    /// The limit of a resource.
    pub(super) fn limit(&self, resource: &str) -> Option<&str> {
        match resource {
            "cpu" => self.cpu_limit.as_deref(),
            "memory" => self.memory_limit.as_deref(),
            _ => None,
        }
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "skip-inbound-ports" => self.skip_inbound_ports = ports(value)?,
            "skip-outbound-ports" => self.skip_outbound_ports = ports(value)?,
            "log-level" => self.log_level = Some(log_level(value)?),
            "workers" => {
                let workers = value.parse().ok().filter(|count| (1..=64).contains(count));
                self.workers =
                    Some(workers.ok_or_else(|| format!("{value:?} is not a number from 1 to 64"))?);
            }
            "source-address" => self.source_address = Some(source_address(value)?),
            "cpu" => self.cpu = Some(quantity(value)?),
            "memory" => self.memory = Some(quantity(value)?),
            "cpu-limit" => self.cpu_limit = Some(quantity(value)?),
            "memory-limit" => self.memory_limit = Some(quantity(value)?),
            _ => return Err(format!("it is unknown; known annotations are {KNOWN}")),
        }
        Ok(())
    }
}

fn ports(value: &str) -> Result<Vec<u16>, String> {
    let parse = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
    let ports: Option<Vec<u16>> = value.split(',').map(parse).collect();
    ports.ok_or_else(|| format!("{value:?} is not a list of ports; write for example 25,3306"))
}

fn log_level(value: &str) -> Result<String, String> {
    match value {
        "error" | "warn" | "info" | "debug" | "trace" => Ok(value.to_owned()),
        _ => Err(format!("{value:?} is not a log level; write error, warn, info, debug or trace")),
    }
}

fn source_address(value: &str) -> Result<SourceAddress, String> {
    match value {
        "preserve" => Ok(SourceAddress::Preserve),
        "sidecar" => Ok(SourceAddress::Sidecar),
        _ => Err(format!("{value:?} is not a source address; write preserve or sidecar")),
    }
}

/// Checked here because the API server's error would name an injected container, not the annotation.
fn quantity(value: &str) -> Result<String, String> {
    match Quantity::parse(value).filter(|quantity| !quantity.is_zero()) {
        Some(_) => Ok(value.to_owned()),
        None => Err(format!("{value:?} is not a quantity above 0; write for example 100m or 32Mi")),
    }
}
