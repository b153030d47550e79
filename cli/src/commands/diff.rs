//! `tulle diff`: what of the recent traffic a policy would deny, before it is applied.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tulle_mesh::query::{Diff, DiffRow, Paths};

use super::access::name;
use super::explain::visible;
use super::lint::read::{self, Input};
use super::lint::{LISTS_ALL, mistake};
use super::stat;
use crate::cluster::Context;
use crate::exit::CliError;
use crate::human;
use crate::output::{Format, Table, write};

/// Options of `tulle diff`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Exit code 3: something would be denied, and --fail-on says so.")]
pub struct Args {
    /// A file with one or more MeshPolicies; - for standard input
    #[arg(short, long, value_name = "FILE")]
    filename: PathBuf,
    /// The time whose traffic is compared, from 10s to 6h
    #[arg(long, default_value = "1h", value_parser = human::duration)]
    window: Duration,
    /// End with exit code 3 if traffic would be denied, or if that depends on the request
    #[arg(long, value_enum, value_name = "VERDICT")]
    fail_on: Option<FailOn>,
}

/// What counts as a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum FailOn {
    /// Traffic that would be denied
    Denied,
    /// The same, and traffic that may be
    Depends,
}

/// What one policy would do.
#[derive(Debug, Serialize)]
struct Answer {
    /// `namespace/name`.
    policy: String,
    #[serde(flatten)]
    diff: Diff,
}

/// Runs `tulle diff`.
///
/// # Errors
/// [`CliError::Findings`] as `--fail-on` asks for; or the file has no policy, or the operator cannot answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let window = stat::window(args.window)?;
    let input = read::files(std::slice::from_ref(&args.filename))?.whole()?;
    let policies = policies(&input, context.namespace())?;
    for policy in &policies {
        visible(context, &policy.namespace)?;
    }
    let operator = context.operator().await?;
    let mut answers = Vec::new();
    for policy in policies {
        let asked = operator.post(Paths::DIFF, &[("window", window.as_str())], &policy.object).await;
        let diff: Diff = asked.map_err(|error| policy.failed(error))?;
        answers.push(Answer { policy: policy.qualified(), diff });
    }
    match context.output.format {
        Format::Table | Format::Wide => {
            let rows = answers.iter().any(|answer| !answer.diff.rows.is_empty());
            let table = if rows {
                context.output.text(&answers, |wide| table(&answers, wide))?
            } else {
                String::new()
            };
            let summary: String = answers.iter().map(summary).collect();
            write(&format!("{table}{summary}"))?;
        }
        Format::Json | Format::Yaml | Format::Name => {
            context.output.print(&answers, |_| names(&answers))?;
        }
    }
    missing(&answers, args.window).iter().for_each(|note| crate::exit::note(&format!("note: {note}")));
    if is_finding(&answers, args.fail_on) { Err(CliError::Findings) } else { Ok(()) }
}

/// What is missing in the traffic that the policies were compared with.
fn missing(answers: &[Answer], asked: Duration) -> Vec<String> {
    let window = answers.iter().map(|answer| answer.diff.window).min().unwrap_or_default();
    let lost = answers.iter().map(|answer| answer.diff.lost).max().unwrap_or_default();
    stat::notes(asked.as_secs(), window, lost)
}

fn is_finding(answers: &[Answer], fail_on: Option<FailOn>) -> bool {
    let mut rows = answers.iter().flat_map(|answer| &answer.diff.rows);
    match fail_on {
        None => false,
        Some(FailOn::Denied) => rows.any(|row| row.verdict == "denied"),
        Some(FailOn::Depends) => rows.next().is_some(),
    }
}

/// A MeshPolicy of a file.
#[derive(Debug)]
struct Policy {
    file: String,
    namespace: String,
    name: String,
    object: Value,
}

impl Policy {
    /// `namespace/name`.
    fn qualified(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// An error of the question about it. The operator names neither the file nor the policy.
    fn failed(&self, error: CliError) -> CliError {
        match error {
            CliError::Failed { what, hint } => {
                let is_unreadable = what.contains(UNREADABLE);
                let hint = hint.or_else(|| is_unreadable.then(|| LISTS_ALL.to_owned()));
                let what = format!("{}: MeshPolicy {}: {what}", self.file, self.qualified());
                CliError::Failed { what, hint }
            }
            other => other,
        }
    }
}

/// What is in the operator's refusal of a policy with a field that it does not know.
const UNREADABLE: &str = "not a MeshPolicy";

/// The MeshPolicies of files. Other kinds are skipped.
fn policies(input: &Input, namespace: Option<&str>) -> Result<Vec<Policy>, CliError> {
    let mut found = Vec::new();
    for document in input.documents.iter().filter(|document| document.kind() == "MeshPolicy") {
        let name = document.name();
        if name.is_empty() {
            let what = format!("{}: a MeshPolicy has no metadata.name", document.file);
            return Err(CliError::failed(what).hint("add it; the operator compares policies by name"));
        }
        let own = Some(document.namespace("")).filter(|own| !own.is_empty()).or(namespace);
        let Some(own) = own else {
            let what = format!("MeshPolicy {name} has no metadata.namespace");
            return Err(CliError::failed(what).hint("add it, or name the namespace with -n"));
        };
        // The operator would name neither the file nor the field.
        if let Some(mistake) = mistake(document, own) {
            return Err(mistake);
        }
        let mut object = document.value.clone();
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("namespace".to_owned(), Value::String(own.to_owned()));
        }
        let (file, namespace, name) = (document.file.clone(), own.to_owned(), name.to_owned());
        found.push(Policy { file, namespace, name, object });
    }
    if found.is_empty() {
        return Err(CliError::failed("there is no MeshPolicy in the file")
            .hint("name a file with a policy as `kubectl apply -f` takes it"));
    }
    Ok(found)
}

fn table(answers: &[Answer], wide: bool) -> Table {
    let mut headers = vec!["SRC", "DST", "PROTO", "VERDICT", "RPS", "BECAUSE"];
    if wide {
        headers.push("POLICY");
    }
    let row = |answer: &Answer, row: &DiffRow| {
        let edge = &row.edge;
        let mut cells = vec![
            name(&edge.source),
            name(&edge.destination),
            edge.protocol.clone(),
            row.verdict.clone(),
            human::rate(edge.golden.rps),
            row.because.clone(),
        ];
        if wide {
            cells.push(answer.policy.clone());
        }
        cells
    };
    let rows = answers.iter().flat_map(|answer| answer.diff.rows.iter().map(move |one| row(answer, one)));
    Table { headers, rows: rows.collect() }
}

fn names(answers: &[Answer]) -> Table {
    let rows = answers.iter().map(|answer| vec![answer.policy.clone()]).collect();
    Table { headers: vec!["NAME"], rows }
}

/// What a policy would do, in a line.
fn summary(answer: &Answer) -> String {
    let Diff { pods, rows, window, .. } = &answer.diff;
    let count = |verdict: &str| rows.iter().filter(|row| row.verdict == verdict).count();
    let sidecars = if *pods == 1 { "sidecar" } else { "sidecars" };
    let (denied, depends) = (count("denied"), count("depends"));
    let time = human::age(Duration::from_secs(*window));
    let what = match (denied, depends) {
        (0, 0) => format!("nothing of the traffic of the last {time} would be denied"),
        (_, 0) => format!("{denied} of the connections between workloads in the last {time} would be denied"),
        _ => format!(
            "{denied} of the connections between workloads in the last {time} would be denied, {depends} may be, depending on the request"
        ),
    };
    format!("MeshPolicy {}: {pods} {sidecars} would enforce it; {what}\n", answer.policy)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use tulle_mesh::query::{Edge, Party};

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn a_policy_is_compared_with_an_hour_unless_the_user_says_otherwise() {
        let window = |line: &[&str]| stat::window(Line::try_parse_from(line).ok().unwrap().args.window);
        assert_eq!(window(&["diff", "-f", "a.yaml"]), Ok("3600".to_owned()));
        assert_eq!(window(&["diff", "-f", "a.yaml", "--window", "6h"]), Ok("21600".to_owned()));
        assert!(window(&["diff", "-f", "a.yaml", "--window", "7h"]).is_err());
    }

    fn answer(verdicts: &[&str]) -> Answer {
        let row = |verdict: &&str| DiffRow {
            edge: Edge {
                source: Party { kind: "Plain".into(), ..Party::default() },
                destination: Party {
                    namespace: "shop".into(),
                    kind: "Deployment".into(),
                    name: "web".into(),
                },
                protocol: "http1".into(),
                ..Edge::default()
            },
            verdict: (*verdict).to_owned(),
            because: "so it is".into(),
        };
        let rows = verdicts.iter().map(row).collect();
        Answer { policy: "shop/p".into(), diff: Diff { pods: 3, rows, window: 3_600, lost: 0 } }
    }

    #[test]
    fn policies_of_a_file_get_the_namespace_of_the_command_and_other_kinds_are_skipped() {
        let text = "kind: Service\nmetadata: {name: web}\n---\nkind: MeshPolicy\nmetadata: {name: a}\n---\n\
                    kind: List\nitems:\n- {kind: MeshPolicy, metadata: {name: b, namespace: pay}}\n";
        let read = |text: &str| {
            let mut input = Input::default();
            read::documents("file", text, &mut input);
            input
        };
        let found = policies(&read(text), Some("shop")).unwrap();
        let names: Vec<String> = found.iter().map(Policy::qualified).collect();
        assert_eq!(names, ["shop/a", "pay/b"]);
        assert_eq!(found[0].object["metadata"]["namespace"], "shop");
        assert!(policies(&read(text), None).unwrap_err().to_string().contains("MeshPolicy a"));
        let none = policies(&read("kind: Service\n"), Some("shop")).unwrap_err();
        assert_eq!(none.to_string(), "there is no MeshPolicy in the file");
        assert!(read("a: [").whole().is_err());
    }

    #[test]
    fn a_policy_with_an_invalid_value_is_refused_with_its_file_and_field() {
        let mut input = Input::default();
        let text = "{apiVersion: tulle.dev/v1alpha1, kind: MeshPolicy, metadata: {name: p}, \
                    spec: {target: {kind: Service, name: web}, mtls: strict}}";
        read::documents("p.yaml", text, &mut input);
        let error = policies(&input, Some("shop")).unwrap_err();
        let CliError::Failed { what, hint } = error else { panic!("{error:?}") };
        assert!(
            what.starts_with("p.yaml: MeshPolicy shop/p: spec.mtls: \"strict\" must be one of"),
            "{what}"
        );
        assert!(hint.unwrap().contains("tulle lint -f"));
    }

    #[test]
    fn what_the_operator_refuses_is_said_with_its_file_and_policy() {
        let policy =
            Policy { file: "p.yaml".into(), namespace: "shop".into(), name: "p".into(), object: Value::Null };
        let typo = CliError::failed("not a MeshPolicy as JSON: unknown field `timeouts`");
        let CliError::Failed { what, hint } = policy.failed(typo) else { panic!("another kind of error") };
        assert_eq!(what, "p.yaml: MeshPolicy shop/p: not a MeshPolicy as JSON: unknown field `timeouts`");
        assert!(hint.unwrap().contains("tulle lint -f"));
        let CliError::Failed { hint, .. } = policy.failed(CliError::failed("the operator is gone")) else {
            panic!("another kind of error")
        };
        assert_eq!(hint, None);
    }

    #[test]
    fn findings_are_what_the_user_asks_for() {
        let found = |verdicts: &[&str], fail_on| is_finding(&[answer(verdicts)], fail_on);
        assert!(!found(&["denied"], None));
        assert!(found(&["depends", "denied"], Some(FailOn::Denied)));
        assert!(!found(&["depends"], Some(FailOn::Denied)));
        assert!(found(&["depends"], Some(FailOn::Depends)));
        assert!(!found(&[], Some(FailOn::Depends)));
    }

    #[test]
    fn a_shorter_time_than_was_asked_for_is_said_once() {
        let known = |window: u64| {
            let mut answer = answer(&[]);
            answer.diff.window = window;
            answer
        };
        let hour = Duration::from_secs(3_600);
        assert!(missing(&[known(3_600), known(3_610)], hour).is_empty());
        let said = missing(&[known(1_200), known(1_201)], hour);
        assert_eq!(said, ["only the last 20m are known: the operator has no older counts"]);
    }

    #[test]
    fn a_line_says_who_would_enforce_it_and_what_it_would_do() {
        let text = summary(&answer(&["denied", "depends"]));
        let start = "MeshPolicy shop/p: 3 sidecars would enforce it; 1 of the connections between workloads in the last 60m";
        assert!(text.starts_with(start), "{text}");
        assert!(text.contains("1 may be, depending on the request"), "{text}");
        assert!(summary(&answer(&[])).contains("nothing of the traffic of the last 60m would be denied"));
        assert_eq!(table(&[answer(&["denied"])], false).rows[0][0], "clients without a sidecar");
    }
}
