//! Generates the templates of the Helm chart `config/helm/tulle`.
//!
//! In: the manifests of `config/base` and `crds/manifests`, as text, comments included. Out: one template per
//! file, in which fixed texts of the manifest are replaced by the release's namespace and the chart's values. Never
//! parses YAML. `Chart.yaml`, `values.yaml`, its schema and the templates named in [`HANDWRITTEN`] are not generated.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::host;

/// Templates that are not generated.
const HANDWRITTEN: [&str; 3] = ["NOTES.txt", "_helpers.tpl", "undo-rbac.yaml"];

/// Files of `config/base` without a template: those of kustomize, and the namespace, which Helm creates.
const LEFT_OUT: [&str; 3] = ["images.yaml", "kustomization.yaml", "namespace.yaml"];

/// Namespace of the kustomize base, replaced by the release's namespace.
const NAMESPACE: &str = "tulle-system";

/// A text of a manifest, and its replacement in the chart. `PART` stands for the file's name without `.yaml`.
struct Substitution {
    /// File names in `config/base`.
    files: &'static [&'static str],
    text: &'static str,
    /// How often the text must occur, so that a change of the manifest cannot silently remove a value of the chart.
    times: usize,
    template: &'static str,
}

const SUBSTITUTIONS: &[Substitution] = &[
    Substitution {
        files: &["admission.yaml"],
        text: "kube-node-lease]",
        times: 5,
        // A namespace made by `helm install --create-namespace` lacks the label tulle.dev/control-plane.
        template: "kube-node-lease, {{ .Release.Namespace | quote }}]",
    },
    Substitution {
        files: &["operator.yaml", "webhook.yaml"],
        text: "  replicas: 2\n",
        times: 1,
        template: "  replicas: {{ .Values.PART.replicas }}\n",
    },
    Substitution {
        files: &["operator.yaml", "webhook.yaml"],
        text: "      serviceAccountName: tulle-PART\n",
        times: 1,
        template: "      serviceAccountName: tulle-PART
      {{- with .Values.imagePullSecrets }}
      imagePullSecrets: {{- toYaml . | nindent 8 }}
      {{- end }}
",
    },
    Substitution {
        files: &["operator.yaml", "webhook.yaml"],
        text: "          image: tulle.local/PART:dev\n",
        times: 1,
        template: "          image: {{ include \"tulle.image\" (dict \"part\" \"PART\" \"root\" .) | quote }}
          {{- with .Values.imagePullPolicy }}
          imagePullPolicy: {{ . }}
          {{- end }}
",
    },
    Substitution {
        files: &["operator.yaml"],
        text: "          resources:\n            requests: {cpu: 50m, memory: 64Mi}\n",
        times: 1,
        template: "          resources: {{- toYaml .Values.operator.resources | nindent 12 }}\n",
    },
    Substitution {
        files: &["webhook.yaml"],
        text: "          resources:\n            requests: {cpu: 20m, memory: 32Mi}\n",
        times: 1,
        template: "          resources: {{- toYaml .Values.webhook.resources | nindent 12 }}\n",
    },
    Substitution {
        files: &["operator.yaml", "webhook.yaml"],
        text: "{name: TULLE_TRUST_DOMAIN, value: cluster.local}",
        times: 1,
        template: "{name: TULLE_TRUST_DOMAIN, value: {{ .Values.trustDomain | quote }}}",
    },
    Substitution {
        files: &["webhook.yaml"],
        text: "\"tulle.local/sidecar:dev\"",
        times: 1,
        template: "{{ include \"tulle.image\" (dict \"part\" \"sidecar\" \"root\" .) | quote }}",
    },
];

/// Labels of every object of the chart.
const LABELS: &str = "  labels: {{- include \"tulle.labels\" . | nindent 4 }}\n";

/// Annotation of every CustomResourceDefinition, because `helm uninstall` would delete all its objects with it.
const KEEP: &str = "  annotations: {helm.sh/resource-policy: keep}\n";

/// The chart's folder.
fn folder() -> PathBuf {
    host::workspace().join("config/helm/tulle")
}

/// File name and text of every generated template.
fn templates() -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    for (name, manifest) in manifests("config/base")? {
        let template = template(&name, &manifest)?;
        templates.insert(name, template);
    }
    for name in SUBSTITUTIONS.iter().flat_map(|substitution| substitution.files) {
        ensure!(
            templates.contains_key(*name),
            "SUBSTITUTIONS in e2e/src/chart.rs names config/base/{name}, which does not exist"
        );
    }
    for (name, manifest) in manifests("crds/manifests")? {
        let name = format!("crd-{name}");
        let template = with_metadata(&name, &escaped(&manifest), &[LABELS, KEEP])?;
        templates.insert(name.clone(), header("crds/manifests", &name) + &template);
    }
    Ok(templates)
}

/// The template of a manifest of `config/base`.
fn template(name: &str, manifest: &str) -> Result<String> {
    let mut text = escaped(manifest);
    let part = name.trim_end_matches(".yaml");
    for substitution in SUBSTITUTIONS.iter().filter(|substitution| substitution.files.contains(&name)) {
        let (old, times) = (substitution.text.replace("PART", part), substitution.times);
        let found = text.matches(&old).count();
        ensure!(
            found == times,
            "config/base/{name} has {old:?} {found} times, expected {times}: adapt SUBSTITUTIONS in e2e/src/chart.rs"
        );
        text = text.replace(&old, &substitution.template.replace("PART", part));
    }
    let namespace = |value: &str| format!("namespace: {value}");
    text = text.replace(&namespace(NAMESPACE), &namespace("{{ .Release.Namespace | quote }}"));
    if let Some(line) = text.lines().find(|line| line.contains(NAMESPACE) || line.contains("tulle.local/")) {
        bail!(
            "config/base/{name}: no value of the chart replaces {:?}: add one to SUBSTITUTIONS in e2e/src/chart.rs",
            line.trim()
        );
    }
    Ok(header("config/base", name) + &with_metadata(name, &text, &[LABELS])?)
}

/// The manifest with additional lines below each object's `metadata:`.
fn with_metadata(name: &str, manifest: &str, lines: &[&str]) -> Result<String> {
    let mut text = String::new();
    for line in manifest.lines() {
        // Indented by two: a field of the object's metadata, since no spec in these manifests has such a field.
        ensure!(
            !["  labels:", "  annotations:"].iter().any(|key| line.starts_with(key)),
            "{name} has {line:?}: the chart sets this field itself, so with_metadata() must learn to merge them"
        );
        text.push_str(line);
        text.push('\n');
        if line == "metadata:" {
            text.extend(lines.iter().copied());
        }
    }
    Ok(text)
}

/// Escapes text so that Helm's template engine prints it unchanged.
fn escaped(manifest: &str) -> String {
    manifest.replace("{{", "{{ \"{{\" }}")
}

/// The first line of a template: a comment that is not rendered.
fn header(source: &str, name: &str) -> String {
    format!(
        "{{{{- /* Generated from {source}/{}: TULLE_UPDATE=1 cargo test -p tulle-e2e chart */ -}}}}\n",
        name.trim_start_matches("crd-")
    )
}

/// Name and text of the manifests in a folder of the workspace.
fn manifests(source: &str) -> Result<Vec<(String, String)>> {
    let source = host::workspace().join(source);
    let names = names(&source)?.into_iter().filter(|name| !LEFT_OUT.contains(&name.as_str()));
    names.map(|name| Ok((name.clone(), read(&source.join(&name))?))).collect()
}

/// The files in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[test]
fn the_checked_in_chart_is_what_the_kustomize_base_generates() {
    let folder = folder().join("templates");
    let generated = templates().unwrap();
    for (name, text) in &generated {
        if std::env::var_os("TULLE_UPDATE").is_some() {
            host::write(&folder.join(name), text).unwrap();
        }
        let checked_in = fs::read_to_string(folder.join(name)).unwrap_or_default();
        assert!(checked_in == *text, "{name} is stale: TULLE_UPDATE=1 cargo test -p tulle-e2e chart");
    }
    let mut others = names(&folder).unwrap();
    others.retain(|name| !generated.contains_key(name));
    others.sort();
    assert_eq!(others, HANDWRITTEN, "templates without a manifest: delete them");
}

#[test]
fn the_chart_has_the_version_of_the_workspace() {
    let chart = read(&folder().join("Chart.yaml")).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    for line in [format!("version: {version}"), format!("appVersion: {version}")] {
        assert!(chart.lines().any(|found| found == line), "Chart.yaml lacks {line:?}");
    }
}

#[test]
fn a_manifest_that_has_lost_the_text_of_a_value_is_named() {
    let manifest = read(&host::workspace().join("config/base/operator.yaml")).unwrap();
    let changed = manifest.replace("replicas: 2", "replicas: 3");
    let error = template("operator.yaml", &changed).unwrap_err().to_string();
    assert!(
        error.starts_with("config/base/operator.yaml has \"  replicas: 2\\n\" 0 times, expected 1"),
        "{error}"
    );
}

#[test]
fn an_image_or_namespace_that_no_value_replaces_is_named() {
    for line in ["image: tulle.local/other:dev", "values: [tulle-system]"] {
        let error = template("other.yaml", &format!("a: b\n{line}\n")).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("config/base/other.yaml: no value of the chart replaces {line:?}")),
            "{error}"
        );
    }
}

#[test]
fn braces_that_helm_would_evaluate_are_escaped() {
    let template = template("other.yaml", "# {{ not an action }}\n").unwrap();
    assert_eq!(template.lines().nth(1), Some("# {{ \"{{\" }} not an action }}"));
}
