//! Settings of the sidecar: annotations `tulle.dev/<name>` of the pod, then of its namespace, then MeshConfig.
//!
//! In: annotations. Out: [`PodSettings`], and a warning for each annotation that is unknown or invalid, and for each
//! setting that stands where it has no effect.

use std::collections::BTreeMap;

use serde_json::Value;
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

/// Prefix of all labels and annotations of Tulle.
const PREFIX: &str = "tulle.dev/";

impl PodSettings {
    /// Reads the annotations of an object; `object` names it in warnings.
    pub fn read<'a>(
        annotations: impl Iterator<Item = (&'a str, &'a str)>,
        object: &str,
        warnings: &mut Vec<String>,
    ) -> Self {
        let mut settings = Self::default();
        for (key, value) in annotations {
            let Some(name) = key.strip_prefix(PREFIX).filter(|_| key != keys::SEAL) else { continue };
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
            "inject" => return Err("it is a label; move it to metadata.labels".to_owned()),
            _ => {
                return Err(format!(
                    "it is unknown; known annotations are {}",
                    keys::SIDECAR_SETTINGS.join(", ")
                ));
            }
        }
        Ok(())
    }
}

/// Warns about labels of a pod that are annotations, or that nobody reads: the author expects an effect.
pub(super) fn warn_about_labels(pod: &Value, warnings: &mut Vec<String>) {
    let labels = pod.pointer("/metadata/labels").and_then(Value::as_object);
    for key in labels.into_iter().flat_map(serde_json::Map::keys) {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        if [keys::INJECT, keys::INJECTED].contains(&key.as_str()) {
            continue;
        }
        warnings.push(if keys::SIDECAR_SETTINGS.contains(&name) {
            format!("label {key} has no effect because it is an annotation; move it to metadata.annotations")
        } else {
            format!(
                "label {key} has no effect because it is unknown; to leave the pod out, set label {} to disabled",
                keys::INJECT
            )
        });
    }
}

/// Warns about settings that a workload has in its own metadata, where they have no effect, and not in its pod template.
/// Those that `old` has too were warned about before.
pub fn warn_about_misplaced(
    workload: &Value,
    old: Option<&Value>,
    template: &Value,
    kind: &str,
    warnings: &mut Vec<String>,
) {
    for (list, word) in [("labels", "label"), ("annotations", "annotation")] {
        let of = |object: &Value, key: &str| {
            object.pointer("/metadata").and_then(|metadata| metadata.get(list)?.get(key)).cloned()
        };
        let settings = workload.pointer("/metadata").and_then(|metadata| metadata.get(list)?.as_object());
        for key in settings.into_iter().flat_map(serde_json::Map::keys) {
            let is_setting = key == keys::INJECT
                || key.strip_prefix(PREFIX).is_some_and(|name| keys::SIDECAR_SETTINGS.contains(&name));
            let value = of(workload, key);
            // A setting that the template has too, as tools write it that label everything alike, has its effect there.
            let is_known = old.and_then(|old| of(old, key)) == value || of(template, key) == value;
            if is_setting && !is_known {
                warnings.push(format!(
                    "{word} {key} of the {kind} has no effect because only that of its pod template is read; move it to the template's metadata"
                ));
            }
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn warned(metadata: &Value, old: Option<&Value>, template: &Value) -> Vec<String> {
        let of = |metadata: &Value| json!({"metadata": metadata});
        let old = old.map(of);
        let mut warnings = Vec::new();
        let (workload, template) = (of(metadata), of(template));
        warn_about_misplaced(&workload, old.as_ref(), &template, "Deployment", &mut warnings);
        warnings
    }

    #[test]
    fn a_setting_of_the_workload_and_not_of_its_template_is_named_once() {
        let opt_out = json!({"labels": {"app": "web", "tulle.dev/inject": "disabled"}});
        assert_eq!(
            warned(&opt_out, None, &json!({"labels": {"app": "web"}})),
            [
                "label tulle.dev/inject of the Deployment has no effect because only that of its pod template is read; move it to the template's metadata"
            ]
        );
        let none: [&str; 0] = [];
        assert_eq!(warned(&opt_out, Some(&opt_out), &json!({})), none, "an update that keeps it");
        assert_eq!(warned(&opt_out, None, &opt_out), none, "a tool that labels everything alike");
        assert_eq!(warned(&opt_out, Some(&json!({"labels": {"app": "web"}})), &json!({})).len(), 1, "added");
        let skips = json!({"annotations": {"tulle.dev/skip-outbound-ports": "5432", "tulle.dev/team": "a"}});
        let warnings = warned(&skips, None, &json!({}));
        assert!(warnings.len() == 1 && warnings[0].starts_with("annotation tulle.dev/skip-outbound-ports"));
    }

    #[test]
    fn a_label_of_a_pod_that_is_an_annotation_or_unknown_is_named() {
        let labels = json!({"tulle.dev/injected": "false", "tulle.dev/workers": "2", "tulle.dev/inject": "disabled",
            "tulle.dev/sidecar": "0.1.0", "app": "web"});
        let mut warnings = Vec::new();
        warn_about_labels(&json!({"metadata": {"labels": labels}}), &mut warnings);
        assert_eq!(
            warnings,
            [
                "label tulle.dev/injected has no effect because it is unknown; to leave the pod out, set label tulle.dev/inject to disabled",
                "label tulle.dev/workers has no effect because it is an annotation; move it to metadata.annotations",
            ]
        );
    }

    #[test]
    fn a_label_that_is_written_as_an_annotation_is_called_a_label() {
        let mut warnings = Vec::new();
        let annotations = [("tulle.dev/inject", "disabled")];
        PodSettings::read(annotations.into_iter(), "", &mut warnings);
        assert_eq!(
            warnings,
            ["annotation tulle.dev/inject has no effect because it is a label; move it to metadata.labels"]
        );
    }
}
