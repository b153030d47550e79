//! `tulle access`: who may reach what, and the least policies that the traffic seen needs.

use std::collections::HashSet;
use std::time::Duration;

use tulle_mesh::query::{Access, Party, Paths, Unidentified};

use super::explain::{destination, visible, workload};
use super::stat;
use crate::cluster::Context;
use crate::exit::CliError;
use crate::human;
use crate::output::{Format, Table, write};
use crate::tenants::some_of;

/// Options of `tulle access`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    question: Question,
}

/// What is asked.
#[derive(Clone, Debug, clap::Subcommand)]
enum Question {
    /// Who can reach a workload or Service
    WhoCan {
        /// NAME, KIND/NAME or NAMESPACE/NAME of a workload or Service
        #[arg(value_name = "DST")]
        destination: String,
        /// The time whose requests are counted, from 10s to 6h
        #[arg(long, default_value = "1h", value_parser = human::duration)]
        window: Duration,
    },
    /// What a workload can reach, in all namespaces: needs -A
    WhatCan {
        /// NAMESPACE/NAME of a workload or pod
        #[arg(value_name = "SRC")]
        source: String,
        /// The time whose requests are counted, from 10s to 6h
        #[arg(long, default_value = "1h", value_parser = human::duration)]
        window: Duration,
    },
    /// Print policies in Shadow mode that allow the recent traffic to workloads without access rules, and no other
    Suggest {
        /// The time whose traffic is allowed, from 10s to 6h
        // All that the operator keeps: a policy that is made of an hour denies a client that calls every two hours.
        #[arg(long, default_value = "6h", value_parser = human::duration)]
        window: Duration,
    },
}

/// Runs `tulle access`.
///
/// # Errors
/// The operator cannot answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    match args.question {
        Question::WhoCan { destination: named, window } => {
            let (namespace, name) = server(&named, context.namespace())?;
            visible(context, &namespace)?;
            can(context, "who", &namespace, &name, window).await
        }
        Question::WhatCan { source, window } => {
            if context.namespace().is_some() {
                let why = "what a workload can reach is decided in every namespace: add -A, and write NAMESPACE/NAME";
                return Err(CliError::Usage(why.to_owned()));
            }
            let (namespace, name) = workload(&source, None)?;
            can(context, "what", &namespace, &name, window).await
        }
        Question::Suggest { window } => suggest(context, window).await,
    }
}

/// Prints who can reach a workload, or what it can reach.
async fn can(
    context: &Context,
    direction: &str,
    namespace: &str,
    name: &str,
    asked: Duration,
) -> Result<(), CliError> {
    let window = stat::window(asked)?;
    let parameters =
        [("namespace", namespace), ("name", name), (direction, "can"), ("window", window.as_str())];
    let found = ask(context, &parameters).await?;
    for note in stat::notes(asked.as_secs(), found.window, found.lost) {
        crate::exit::note(&format!("note: {note}"));
    }
    context.output.print(&found, |wide| table(&found, wide))
}

/// Namespace and name of a workload or Service.
fn server(text: &str, namespace: Option<&str>) -> Result<(String, String), CliError> {
    let is_service =
        text.starts_with("svc/") || text.starts_with("service/") || text.starts_with("services/");
    if !is_service && text.contains('/') {
        return workload(text, namespace);
    }
    destination(text, namespace)?.service()
}

async fn ask(context: &Context, parameters: &[(&str, &str)]) -> Result<Access, CliError> {
    let found: Access = context.operator().await?.get(Paths::ACCESS, parameters).await?;
    if found.truncated {
        crate::exit::note(&format!(
            "There are more rows than the operator answers at a time: these are the first {}. Ask for one workload, or add -n.",
            found.rows.len()
        ));
    }
    Ok(found)
}

async fn suggest(context: &Context, asked: Duration) -> Result<(), CliError> {
    let window = stat::window(asked)?;
    let mut parameters = vec![("who", "can"), ("window", window.as_str())];
    parameters.extend(context.namespace().map(|namespace| ("namespace", namespace)));
    let found = ask(context, &parameters).await?;
    let format = context.output.format;
    notes(&found, asked, format).iter().for_each(|note| crate::exit::note(note));
    match format {
        Format::Json => context.output.print(&found.suggested, |_| Table::default()),
        Format::Name => write(&found.suggested.iter().map(name_of).collect::<String>()),
        Format::Table | Format::Wide | Format::Yaml => write(&documents(&found)?),
    }
}

/// What the reader of suggested policies must know about them, and what is not among the policies in this format.
fn notes(found: &Access, asked: Duration, format: Format) -> Vec<String> {
    let missing = stat::notes(asked.as_secs(), found.window, found.lost);
    let mut notes: Vec<String> = missing.iter().map(|note| format!("note: {note}")).collect();
    let known = known(found);
    if found.suggested.is_empty() {
        notes.push(format!(
            "No suggestions: every workload that named clients called in the last {known} has access rules, or no labels of its own."
        ));
    } else if matches!(format, Format::Json | Format::Name) {
        notes.push(format!("note: these policies allow the traffic of the last {known}"));
    }
    notes.extend(found.unidentified.iter().flat_map(left_out).map(|line| format!("note: {line}")));
    notes
}

/// Lines about clients of a workload that the policies do not admit, because they have no identity.
fn left_out(of: &Unidentified) -> Vec<String> {
    let to = name(&of.destination);
    let requests = |count: u64| if count == 1 { "1 request".to_owned() } else { format!("{count} requests") };
    let mut lines = Vec::new();
    if of.plain > 0 {
        let senders: Vec<String> = of.senders.iter().map(name).collect();
        let senders = match senders.is_empty() {
            true => "without a sidecar, or outside of the cluster".to_owned(),
            false => format!("and among them {}, whose sidecars sent plain text", some_of(&senders)),
        };
        lines.push(format!(
            "{} to {to} came from clients without an identity ({senders}), whom no suggested policy admits: before it is \
             enforced give them a sidecar, or add their addresses as `cidr`",
            requests(of.plain)
        ));
    }
    if of.merged > 0 {
        lines.push(format!(
            "{} to {to} came from clients that its sidecars did not tell apart, since there are too many: add those that \
             are missing by hand",
            requests(of.merged)
        ));
    }
    lines
}

/// The time that an answer is about.
fn known(found: &Access) -> String {
    human::age(Duration::from_secs(found.window))
}

/// The policies as YAML documents, as `kubectl apply -f -` takes them, below a comment about their time.
fn documents(found: &Access) -> Result<String, CliError> {
    let mut text = String::new();
    for policy in &found.suggested {
        let yaml = crate::yaml::to_string(policy)
            .map_err(|error| CliError::failed(format!("the policy has no YAML form: {error}")))?;
        if text.is_empty() {
            text = format!("# These policies allow the traffic of the last {}.\n", known(found));
            let left_out = found.unidentified.iter().flat_map(left_out);
            left_out.for_each(|line| {
                text.push_str(&format!("# Not allowed: {}.\n", crate::output::plain(&line)))
            });
        } else {
            text.push_str("---\n");
        }
        text.push_str(&yaml);
    }
    Ok(text)
}

/// A line with a policy's name.
fn name_of(policy: &serde_json::Value) -> String {
    let field = |name: &str| policy.pointer(&format!("/metadata/{name}")).and_then(|value| value.as_str());
    format!("{}/{}\n", field("namespace").unwrap_or_default(), field("name").unwrap_or_default())
}

/// A table. What was seen of a client is not known by operation, so that only the first of its rows to a workload has it.
fn table(found: &Access, wide: bool) -> Table {
    let all = |values: &[String]| if values.is_empty() { "*".to_owned() } else { values.join(",") };
    let mut headers = vec!["CLIENT", "DESTINATION"];
    if wide {
        headers.push("KIND");
    }
    headers.extend(["METHODS", "PATHS", "ALLOWED BY", "SEEN"]);
    let (mut counted, mut rows) = (HashSet::new(), Vec::with_capacity(found.rows.len()));
    for row in &found.rows {
        let client = row.client.split(" (port ").next().unwrap_or_default();
        let is_first = counted.insert((client, &row.destination, row.allowed_by.as_str()));
        let seen = if is_first { row.seen.to_string() } else { human::UNKNOWN.to_owned() };
        let by = if row.allowed_by.is_empty() { human::UNKNOWN.to_owned() } else { row.allowed_by.clone() };
        let mut cells = vec![row.client.clone(), name(&row.destination)];
        if wide {
            cells.push(row.destination.kind.clone());
        }
        cells.extend([all(&row.methods), all(&row.paths), by, seen]);
        rows.push(cells);
    }
    Table { headers, rows }
}

/// A party as `namespace/name`.
pub fn name(party: &Party) -> String {
    match party.kind.as_str() {
        "Plain" => "clients without a sidecar".to_owned(),
        _ => format!("{}/{}", party.namespace, party.name),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use tulle_mesh::query::AccessRow;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn window_of(line: &[&str]) -> Duration {
        match Line::try_parse_from(line).ok().unwrap().args.question {
            Question::Suggest { window }
            | Question::WhoCan { window, .. }
            | Question::WhatCan { window, .. } => window,
        }
    }

    #[test]
    fn policies_are_suggested_for_all_that_is_kept_unless_the_user_says_otherwise() {
        assert_eq!(stat::window(window_of(&["access", "suggest"])), Ok("21600".to_owned()));
        let hour = window_of(&["access", "suggest", "--window", "1h"]);
        assert_eq!(stat::window(hour), Ok("3600".to_owned()));
        assert!(Line::try_parse_from(["access", "suggest", "--window", "60"]).is_err());
    }

    #[test]
    fn requests_are_counted_over_an_hour_unless_the_user_says_otherwise() {
        for [question, name] in [["who-can", "web"], ["what-can", "shop/web"]] {
            assert_eq!(stat::window(window_of(&["access", question, name])), Ok("3600".to_owned()));
            let long = window_of(&["access", question, name, "--window", "6h"]);
            assert_eq!(stat::window(long), Ok("21600".to_owned()));
            let longer = window_of(&["access", question, name, "--window", "7h"]);
            assert_eq!(stat::window(longer).unwrap_err().code(), 2);
        }
        assert_eq!(table(&Access::default(), false).headers.last(), Some(&"SEEN"));
    }

    #[test]
    fn a_server_is_a_workload_or_a_service() {
        for text in ["web", "deployment/web", "svc/web", "web.shop", "shop/web"] {
            let found = server(text, Some("shop")).unwrap();
            assert_eq!((found.0.as_str(), found.1.as_str()), ("shop", "web"), "{text}");
        }
    }

    #[test]
    fn what_is_not_restricted_is_a_star_and_what_nobody_allows_a_dash() {
        let destination = Party { namespace: "shop".into(), kind: "Deployment".into(), name: "web".into() };
        let row = AccessRow { client: "everybody".into(), destination, seen: 7, ..AccessRow::default() };
        let found = Access { rows: vec![row], ..Access::default() };
        let narrow = table(&found, false);
        assert_eq!(narrow.rows, [["everybody", "shop/web", "*", "*", "-", "7"]]);
        let wide = table(&found, true);
        assert_eq!((wide.headers.len(), wide.rows[0].len()), (7, 7));
        assert_eq!(wide.rows[0][2], "Deployment");
    }

    #[test]
    fn what_was_seen_of_a_client_stands_in_the_first_of_its_rows() {
        let row = |client: &str, method: &str| AccessRow {
            client: client.into(),
            methods: vec![method.into()],
            seen: 7,
            ..AccessRow::default()
        };
        let rows = vec![row("shop/web (port 80)", "GET"), row("shop/web", "POST"), row("shop/api", "GET")];
        let found = Access { rows, ..Access::default() };
        let seen: Vec<String> =
            table(&found, false).rows.into_iter().filter_map(|mut cells| cells.pop()).collect();
        assert_eq!(seen, ["7", "-", "7"], "the operator does not know which operations they were");
    }

    #[test]
    fn clients_that_the_policies_leave_out_are_named_in_a_note_and_in_the_documents() {
        let party =
            |name: &str| Party { namespace: "shop".into(), kind: "Deployment".into(), name: name.into() };
        let one =
            Unidentified { destination: party("web"), plain: 7, merged: 1, senders: vec![party("batch")] };
        let suggested = vec![json!({"kind": "MeshPolicy"})];
        let found = Access { suggested, unidentified: vec![one], window: 21_600, ..Access::default() };
        let said = notes(&found, Duration::from_secs(21_600), Format::Yaml);
        let plain = "7 requests to shop/web came from clients without an identity (and among them shop/batch, whose \
                     sidecars sent plain text)";
        assert!(said.len() == 2 && said[0].starts_with(&format!("note: {plain}")), "{said:?}");
        assert!(
            said[1].starts_with("note: 1 request to shop/web came from clients that its sidecars"),
            "{said:?}"
        );
        let text = documents(&found).unwrap();
        assert!(text.contains(&format!("\n# Not allowed: {plain}")), "{text}");
        let code = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(code, 1, "the rest is YAML: {text}");
        let unknown = Unidentified { senders: Vec::new(), merged: 0, ..found.unidentified[0].clone() };
        assert!(left_out(&unknown)[0].contains("(without a sidecar, or outside of the cluster)"));
    }

    #[test]
    fn suggestions_are_documents_that_kubectl_takes() {
        let policy =
            |name: &str| json!({"kind": "MeshPolicy", "metadata": {"name": name, "namespace": "shop"}});
        let suggested = vec![policy("a"), policy("b")];
        let found = Access { suggested, window: 21_600, ..Access::default() };
        let text = documents(&found).unwrap();
        assert!(text.starts_with("# These policies allow the traffic of the last 6h.\nkind: "), "{text}");
        assert_eq!(text.matches("---\n").count(), 1);
        assert_eq!(text.matches("kind: MeshPolicy").count(), 2);
        assert_eq!(name_of(&found.suggested[0]), "shop/a\n");
        assert_eq!(documents(&Access::default()).unwrap(), "");
    }

    #[test]
    fn what_suggestions_are_made_of_is_said() {
        let found = Access { suggested: vec![json!({})], window: 1_200, lost: 1, ..Access::default() };
        let asked = Duration::from_secs(21_600);
        let said = notes(&found, asked, Format::Yaml);
        assert_eq!(said.len(), 2, "{said:?}");
        assert_eq!(said[0], "note: only the last 20m are known: the operator has no older counts");
        assert!(said[1].contains("1 report was lost"), "{said:?}");
        let whole = Access { window: 21_600, lost: 0, ..found };
        assert!(notes(&whole, asked, Format::Yaml).is_empty(), "the documents say it");
        let said = notes(&whole, asked, Format::Json);
        assert_eq!(said, ["note: these policies allow the traffic of the last 6h"]);
        let nothing = Access { suggested: Vec::new(), ..whole };
        let said = notes(&nothing, asked, Format::Json);
        assert!(said.len() == 1 && said[0].contains("called in the last 6h has access rules"), "{said:?}");
    }
}
