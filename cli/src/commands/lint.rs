//! `tulle lint`: mistakes in manifests, before anything is applied.
//!
//! In: YAML and JSON files. Out: findings with stable ids ([`rules::RULES`]). Without `--with-cluster` nothing is sent
//! anywhere: `schema` compares with the generated schemas of Tulle's kinds, `policy`, `rollout` and `settings` check what a
//! schema cannot, `labels` looks at those of Tulle on other kinds, and `together` at all files at once.

mod cluster;
mod labels;
mod policy;
pub(crate) mod read;
#[cfg(test)]
mod reference;
mod rollout;
mod routes;
mod rules;
mod schema;
mod settings;
#[cfg(test)]
mod tests;
mod together;
mod unique;

use std::path::PathBuf;

use clap::ValueEnum;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use tulle_crds::{Canary, MeshConfig, MeshPolicy};

use crate::cluster::Context;
use crate::exit::{CliError, note};
use crate::output::{Colour, Format, Output, Table, write};
use read::{Document, Input};
use rules::{Finding, Level};

/// Arguments of `tulle lint`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Files, or directories with all files below them that end in .yaml, .yml or .json; `-`: standard input
    #[arg(short, long = "file", value_name = "FILE", num_args = 1.., required_unless_present = "rules")]
    files: Vec<PathBuf>,
    /// Ask the API server too: whether it would take the objects, and whether their targets and callers exist. Nothing is changed
    #[arg(long)]
    with_cluster: bool,
    /// The least level of a finding that makes the exit code 3
    #[arg(long, value_enum, default_value = "error", value_name = "LEVEL")]
    fail_on: FailOn,
    /// List the ids of all findings, and what each means
    #[arg(long)]
    rules: bool,
}

/// The least level that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FailOn {
    /// Errors only
    Error,
    /// Errors and warnings
    Warning,
    /// Nothing
    Never,
}

impl FailOn {
    fn includes(self, level: Level) -> bool {
        match self {
            Self::Error => level == Level::Error,
            Self::Warning => true,
            Self::Never => false,
        }
    }
}

/// Runs `tulle lint`.
///
/// # Errors
/// [`CliError::Findings`] for findings at or above `--fail-on`; a file that is not there, or no access to the cluster. What
/// was found without the cluster is printed then, too.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    if args.rules {
        return context.output.print(&rules::RULES, |_| rules::table());
    }
    let input = read::files(&args.files)?;
    let namespace = context.namespace().unwrap_or("default");
    let mut findings = check(&input, namespace, Timestamp::now());
    findings.extend(Finding::of_nothing(&input));
    let asked = match args.with_cluster {
        true => ask(context, &input.documents, namespace, &mut findings).await,
        false => Ok(()),
    };
    print(&context.output, &findings, input.documents.len())?;
    asked?;
    if findings.iter().any(|finding| args.fail_on.includes(finding.level)) {
        return Err(CliError::Findings);
    }
    Ok(())
}

/// Adds what the API server says about the objects.
async fn ask(
    context: &Context,
    documents: &[Document],
    namespace: &str,
    findings: &mut Vec<Finding>,
) -> Result<(), CliError> {
    let client = context.client().await?;
    cluster::check(&client, documents, namespace, findings).await
}

fn print(output: &Output, findings: &[Finding], documents: usize) -> Result<(), CliError> {
    if !matches!(output.format, Format::Table | Format::Wide) {
        let row = |finding: &Finding| vec![finding.id.to_owned(), finding.object.clone()];
        let table = |_| Table { headers: vec!["ID", "OBJECT"], rows: findings.iter().map(row).collect() };
        return output.print(&findings, table);
    }
    for finding in findings {
        write(&text(finding, output))?;
    }
    let of = |level| findings.iter().filter(|finding| finding.level == level).count();
    note(&format!("{documents} objects: {} errors, {} warnings", of(Level::Error), of(Level::Warning)));
    Ok(())
}

/// `error T1103 MeshPolicy shop/payments: …`, the file, and what to do.
fn text(finding: &Finding, output: &Output) -> String {
    let level = match finding.level {
        Level::Error => output.paint(Colour::Red, "error"),
        Level::Warning => output.paint(Colour::Yellow, "warning"),
    };
    let mut text = format!("{level} {} {}: {}\n", finding.id, finding.object, finding.message);
    if !finding.file.is_empty() {
        text.push_str(&format!("  file: {}\n", finding.file));
    }
    if let Some(hint) = &finding.hint {
        text.push_str(&format!("  hint: {hint}\n"));
    }
    text
}

/// Everything that can be found without a cluster. Objects without a namespace are in `namespace`.
fn check(input: &Input, namespace: &str, now: Timestamp) -> Vec<Finding> {
    let files = input.unreadable.iter().map(Finding::of_file);
    let mut findings: Vec<Finding> =
        files.chain(input.templates.iter().map(|file| Finding::of_template(file))).collect();
    let schemas = schema::Schemas::generated();
    for document in &input.documents {
        one(document, namespace, &schemas, now, &mut findings);
    }
    findings.extend(together::check(&input.documents, namespace));
    findings.extend(routes::check(&input.documents, namespace));
    findings
}

/// A kind of Tulle that is written without Tulle's group. Flagger has a kind of the same name.
fn foreign(document: &Document, namespace: &str, schemas: &schema::Schemas) -> Option<Finding> {
    const FLAGGER: &str = "flagger.app/";
    let (kind, found) = (document.kind(), document.api_version());
    let version = schemas.version_of(kind).filter(|_| !found.starts_with(FLAGGER))?;
    let message = match found {
        "" => format!("apiVersion is missing, and {kind} is a kind of Tulle"),
        found => format!("{kind} is a kind of Tulle, and {found} is not its group"),
    };
    let hint = Some(format!("did you mean {version}?"));
    Some(Finding::new(rules::UNKNOWN_KIND, document, namespace, message, hint))
}

/// What is wrong with one object. Of other kinds than Tulle's, only Tulle's labels and annotations are looked at.
fn one(
    document: &Document,
    namespace: &str,
    schemas: &schema::Schemas,
    now: Timestamp,
    findings: &mut Vec<Finding>,
) {
    if !document.is_tulle() {
        findings.extend(foreign(document, namespace, schemas));
        let of =
            |found: rules::Found| Finding::new(found.rule, document, namespace, found.message, found.hint);
        findings.extend(labels::check(document).into_iter().map(of));
        return;
    }
    let mut add = |rule: rules::Rule, message: String, hint: Option<String>| {
        findings.push(Finding::new(rule, document, namespace, message, hint));
    };
    let Some(schema) = schemas.of(document.kind(), document.api_version()) else {
        let message = format!("there is no kind {} in {}", document.kind(), document.api_version());
        return add(rules::UNKNOWN_KIND, message, Some(schemas.known()));
    };
    if document.name().is_empty() {
        add(rules::UNNAMED, "metadata.name is missing".to_owned(), None);
    } else if document.kind() != "MeshConfig" && !is_name(document.name()) {
        let message = format!("metadata.name: invalid name {:?}", document.name());
        let hint = "write lower-case letters, digits, `-` and `.`, with a letter or digit at both ends";
        add(rules::INVALID_VALUE, message, Some(hint.to_owned()));
    }
    let problems = schema::check(schema, &document.value);
    // What cannot be read as its type has been reported; only where it has not, the reader's own words are used.
    let found = match document.kind() {
        "MeshPolicy" => parse::<MeshPolicy>(document).map(|object| policy::check(&object.spec, now)),
        "Canary" => parse::<Canary>(document).map(|object| rollout::check(&object)),
        _ => parse::<MeshConfig>(document).map(|object| settings::check(&object)),
    };
    // The checks of values say what to write, which a range of the schema does not.
    let is_said = |problem: &schema::Problem| {
        let same = |found: &rules::Found| schema::field(&found.message) == schema::field(&problem.message);
        problem.what == schema::What::Value && found.iter().flatten().any(same)
    };
    for problem in problems.iter().filter(|problem| !is_said(problem)) {
        let rule = match problem.what {
            schema::What::Unknown => rules::UNKNOWN_FIELD,
            schema::What::Shape => rules::WRONG_SHAPE,
            schema::What::Value => rules::INVALID_VALUE,
        };
        add(rule, problem.message.clone(), problem.hint.clone());
    }
    match found {
        Ok(found) => found.into_iter().for_each(|found| add(found.rule, found.message, found.hint)),
        Err(error) if problems.is_empty() => add(rules::WRONG_SHAPE, error, None),
        Err(_) => {}
    }
}

/// Whether an object of the API server may be called so: a DNS subdomain of RFC 1123.
fn is_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_end = |byte: Option<&u8>| byte.is_some_and(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9'));
        let bytes = label.as_bytes();
        is_end(bytes.first())
            && is_end(bytes.last())
            && bytes.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// What to do about a file with a mistake.
pub(crate) const LISTS_ALL: &str = "`tulle lint -f FILE` lists everything that is wrong";

/// The first shape or value of an object of Tulle's that its schema does not allow, with its file, and what to do.
pub(crate) fn mistake(document: &Document, namespace: &str) -> Option<CliError> {
    let schemas = schema::Schemas::generated();
    let schema = schemas.of(document.kind(), document.api_version())?;
    let mut problems = schema::check(schema, &document.value).into_iter();
    let problem = problems.find(|problem| problem.what != schema::What::Unknown)?;
    let what = format!("{}: {}: {}", document.file, document.label(namespace), problem.message);
    Some(CliError::failed(what).hint(LISTS_ALL))
}

/// Without status, which nobody applies, and without fields that are not known, which were reported.
fn parse<T: serde::de::DeserializeOwned>(document: &Document) -> Result<T, String> {
    let mut value = document.value.clone();
    if let Some(object) = value.as_object_mut() {
        object.remove("status");
        object.entry("metadata").or_insert_with(|| Value::Object(serde_json::Map::new()));
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}
