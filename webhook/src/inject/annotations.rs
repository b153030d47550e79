//! Per-pod settings: annotations `tulle.dev/<name>`. An unknown or malformed one is answered with a
//! warning that names it, never ignored in silence.

use serde_json::Value;

/// What a pod's annotations ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSettings {
    /// Inbound ports that the sidecar does not see.
    pub skip_inbound_ports: Vec<u16>,
    /// Outbound ports that the sidecar does not see.
    pub skip_outbound_ports: Vec<u16>,
    /// What the sidecar logs.
    pub log_level: Option<String>,
    /// Data threads.
    pub workers: Option<u16>,
    /// CPU request.
    pub cpu: Option<String>,
    /// Memory request.
    pub memory: Option<String>,
    /// CPU limit.
    pub cpu_limit: Option<String>,
    /// Memory limit.
    pub memory_limit: Option<String>,
}

/// The annotations that are read, for the warning about others.
const KNOWN: &str =
    "skip-inbound-ports, skip-outbound-ports, log-level, workers, cpu, memory, cpu-limit, memory-limit";

impl PodSettings {
    /// Reads a pod's annotations.
    pub fn read(pod: &Value, warnings: &mut Vec<String>) -> Self {
        let mut settings = Self::default();
        let annotations = pod.pointer("/metadata/annotations").and_then(Value::as_object);
        for (key, value) in annotations.into_iter().flatten() {
            let Some(name) = key.strip_prefix("tulle.dev/") else { continue };
            let value = value.as_str().unwrap_or("");
            if let Err(why) = settings.set(name, value) {
                warnings.push(format!("annotation {key}: {value:?} has no effect: {why}"));
            }
        }
        settings
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "skip-inbound-ports" => self.skip_inbound_ports = ports(value)?,
            "skip-outbound-ports" => self.skip_outbound_ports = ports(value)?,
            "log-level" => self.log_level = Some(log_level(value)?),
            "workers" => {
                let workers = value.parse().ok().filter(|count| (1..=64).contains(count));
                self.workers = Some(workers.ok_or("write a number of 1 to 64")?);
            }
            "cpu" => self.cpu = Some(quantity(value)?),
            "memory" => self.memory = Some(quantity(value)?),
            "cpu-limit" => self.cpu_limit = Some(quantity(value)?),
            "memory-limit" => self.memory_limit = Some(quantity(value)?),
            _ => return Err(format!("the annotations of a pod are: {KNOWN}")),
        }
        Ok(())
    }
}

fn ports(value: &str) -> Result<Vec<u16>, String> {
    let parse = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
    value.split(',').map(|text| parse(text).ok_or_else(|| "write ports like 25,3306".to_owned())).collect()
}

fn log_level(value: &str) -> Result<String, String> {
    match value {
        "error" | "warn" | "info" | "debug" | "trace" => Ok(value.to_owned()),
        _ => Err("write error, warn, info, debug or trace".to_owned()),
    }
}

/// A Kubernetes quantity, roughly: the API server checks it again and would name a container that the
/// pod's author never wrote.
fn quantity(value: &str) -> Result<String, String> {
    let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = value.get(digits.len()..).unwrap_or("");
    let known = ["", "m", "k", "M", "G", "Ki", "Mi", "Gi"].contains(&unit);
    let number = digits.parse::<f64>().is_ok_and(|number| number > 0.0);
    if known && number { Ok(value.to_owned()) } else { Err("write a quantity like 100m or 32Mi".to_owned()) }
}
