//! The ids of findings. An id never changes its meaning: scripts and documentation name it.

use serde::Serialize;

use super::read::{Document, Input, Unreadable};
use crate::output::Table;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    /// It has no effect, is rejected, or does something else than it says.
    Warning,
    /// It is rejected, or is not enforced.
    Error,
}

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Rule {
    pub(super) id: &'static str,
    pub(super) level: Level,
    pub(super) about: &'static str,
}

const fn error(id: &'static str, about: &'static str) -> Rule {
    Rule { id, level: Level::Error, about }
}

const fn warning(id: &'static str, about: &'static str) -> Rule {
    Rule { id, level: Level::Warning, about }
}

pub(super) const UNREADABLE: Rule = error("T1001", "A file cannot be read, or is not valid YAML or JSON.");
pub(super) const UNKNOWN_KIND: Rule =
    error("T1002", "The group tulle.dev has no such kind or version, or one of its kinds has another group.");
pub(super) const UNNAMED: Rule = error("T1003", "An object has no name.");
pub(super) const TEMPLATE: Rule =
    warning("T1004", "A file below a directory is a template ({{), and was not looked at.");
pub(super) const NOTHING: Rule = warning("T1005", "The files have no object.");
pub(super) const UNKNOWN_FIELD: Rule =
    error("T1101", "A field is not known. The API server would drop or reject it.");
pub(super) const WRONG_SHAPE: Rule = error("T1102", "A field is missing, or has a value of another type.");
pub(super) const INVALID_VALUE: Rule =
    error("T1103", "A value is invalid: a duration, percentage, quantity, address range, path or time.");
pub(super) const CONTRADICTION: Rule =
    error("T1104", "Fields that do not go together, or of which one is needed.");
pub(super) const NO_EFFECT: Rule = warning("T1105", "A section has no effect on this target, or no longer.");
pub(super) const RISKY: Rule = warning("T1106", "A setting that is valid and is often not what was meant.");
pub(super) const NO_TARGET: Rule = warning(
    "T1107",
    "The target is not among the files, although they have objects of its kind in that namespace.",
);
pub(super) const CONFLICT: Rule =
    warning("T1108", "Two MeshPolicies have the same target and section. The older one wins.");
pub(super) const MISPLACED: Rule = warning(
    "T1109",
    "A label or annotation of Tulle on a namespace, pod or workload is not known, or has no effect there.",
);
pub(super) const HIDDEN_RULE: Rule = warning(
    "T1110",
    "Two routes match the same requests to a Service. The older one wins, and both are accepted.",
);
pub(super) const SECOND_CANARY: Rule = error("T1201", "Two Canaries have the same target.");
pub(super) const STEPS: Rule = warning("T1202", "The weights of a Canary's steps do not grow.");
pub(super) const UNJUDGED: Rule = error(
    "T1203",
    "The update strategy of a Canary's target deletes all stable pods, so that no new version is judged.",
);
pub(super) const HINDERED: Rule = warning(
    "T1204",
    "The update strategy of a Canary's target costs stable pods during a rollout (with few replicas, possibly all), or makes rollouts wait for a person.",
);
pub(super) const REJECTED: Rule = error("T1901", "The API server would reject the object.");
pub(super) const ADMISSION_WARNING: Rule = warning("T1902", "The API server would warn about the object.");
pub(super) const NOT_IN_CLUSTER: Rule =
    warning("T1903", "The target exists neither in the cluster nor among the files.");
pub(super) const NO_CALLER: Rule = warning(
    "T1904",
    "A service account that an access rule names exists neither in the cluster nor among the files.",
);

/// Every rule of `tulle lint`.
pub(super) const RULES: [Rule; 23] = [
    UNREADABLE,
    UNKNOWN_KIND,
    UNNAMED,
    TEMPLATE,
    NOTHING,
    UNKNOWN_FIELD,
    WRONG_SHAPE,
    INVALID_VALUE,
    CONTRADICTION,
    NO_EFFECT,
    RISKY,
    NO_TARGET,
    CONFLICT,
    MISPLACED,
    HIDDEN_RULE,
    SECOND_CANARY,
    STEPS,
    UNJUDGED,
    HINDERED,
    REJECTED,
    ADMISSION_WARNING,
    NOT_IN_CLUSTER,
    NO_CALLER,
];

/// All rules as a table.
pub(super) fn table() -> Table {
    let row = |rule: &Rule| {
        let level = match rule.level {
            Level::Error => "error",
            Level::Warning => "warning",
        };
        vec![rule.id.to_owned(), level.to_owned(), rule.about.to_owned()]
    };
    Table { headers: vec!["ID", "LEVEL", "MEANING"], rows: RULES.iter().map(row).collect() }
}

/// Something that was found in an object, before it is known which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) rule: Rule,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl Found {
    pub(super) fn new(rule: Rule, message: impl Into<String>) -> Self {
        Self { rule, message: message.into(), hint: None }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) id: &'static str,
    pub(super) level: Level,
    /// Kind, namespace and name; the file where it cannot be read.
    pub(super) object: String,
    pub(super) file: String,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hint: Option<String>,
}

impl Finding {
    pub(super) fn new(
        rule: Rule,
        document: &Document,
        namespace: &str,
        message: String,
        hint: Option<String>,
    ) -> Self {
        let object = document.label(namespace);
        Self { id: rule.id, level: rule.level, object, file: document.file.clone(), message, hint }
    }

    /// A template, by the name of its file.
    pub(super) fn of_template(file: &str) -> Self {
        Self {
            id: TEMPLATE.id,
            level: TEMPLATE.level,
            object: file.to_owned(),
            file: String::new(),
            message: "this is a template, and was not looked at".to_owned(),
            hint: Some("lint what it renders: helm template … | tulle lint -f -".to_owned()),
        }
    }

    /// That there is nothing to look at.
    pub(super) fn of_nothing(input: &Input) -> Option<Self> {
        (input.documents.is_empty() && input.unreadable.is_empty()).then(|| Self {
            id: NOTHING.id,
            level: NOTHING.level,
            object: "files".to_owned(),
            file: String::new(),
            message: "there is no object in what was named".to_owned(),
            hint: Some("below directories, files that end in .yaml, .yml or .json are read".to_owned()),
        })
    }

    pub(super) fn of_file(unreadable: &Unreadable) -> Self {
        Self {
            id: UNREADABLE.id,
            level: UNREADABLE.level,
            object: unreadable.file.clone(),
            file: String::new(),
            message: unreadable.why.clone(),
            hint: None,
        }
    }
}
