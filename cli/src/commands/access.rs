//! `tulle access`: who may reach what, and the least policies that the traffic seen needs.

use tulle_mesh::query::{Access, AccessRow, Party, Paths};

use super::explain::{destination, visible, workload};
use crate::cluster::Context;
use crate::exit::CliError;
use crate::output::{Format, Table, write};

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
    },
    /// What a workload can reach, in all namespaces: needs -A
    WhatCan {
        /// NAMESPACE/NAME of a workload or pod
        #[arg(value_name = "SRC")]
        source: String,
    },
    /// Print policies in Shadow mode that allow the last hour's traffic to workloads without access rules, and no other
    Suggest,
}

/// Runs `tulle access`.
///
/// # Errors
/// The operator cannot answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    match args.question {
        Question::WhoCan { destination: named } => {
            let (namespace, name) = server(&named, context.namespace())?;
            visible(context, &namespace)?;
            let found = ask(context, &[("namespace", &namespace), ("name", &name), ("who", "can")]).await?;
            context.output.print(&found, |wide| table(&found, wide))
        }
        Question::WhatCan { source } => {
            if context.namespace().is_some() {
                let why = "what a workload can reach is decided in every namespace: add -A, and write NAMESPACE/NAME";
                return Err(CliError::Usage(why.to_owned()));
            }
            let (namespace, name) = workload(&source, None)?;
            let found = ask(context, &[("namespace", &namespace), ("name", &name), ("what", "can")]).await?;
            context.output.print(&found, |wide| table(&found, wide))
        }
        Question::Suggest => suggest(context).await,
    }
}

/// Namespace and name of a workload or Service.
fn server(text: &str, namespace: Option<&str>) -> Result<(String, String), CliError> {
    let is_service =
        text.starts_with("svc/") || text.starts_with("service/") || text.starts_with("services/");
    if !is_service && text.contains('/') {
        return workload(text, namespace);
    }
    let name = destination(text, namespace)?;
    let (namespace, name) = name.split_once('/').unwrap_or_default();
    let name = name.split(':').next().unwrap_or_default();
    Ok((namespace.to_owned(), name.to_owned()))
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

async fn suggest(context: &Context) -> Result<(), CliError> {
    let mut parameters = vec![("who", "can")];
    parameters.extend(context.namespace().map(|namespace| ("namespace", namespace)));
    let found = ask(context, &parameters).await?;
    if found.suggested.is_empty() {
        crate::exit::note(
            "No suggestions: every workload that named clients called in the last hour has access rules, or no labels of its own.",
        );
    }
    match context.output.format {
        Format::Json => context.output.print(&found.suggested, |_| Table::default()),
        Format::Name => write(&found.suggested.iter().map(name_of).collect::<String>()),
        Format::Table | Format::Wide | Format::Yaml => write(&documents(&found.suggested)?),
    }
}

/// YAML documents, as `kubectl apply -f -` takes them.
fn documents(policies: &[serde_json::Value]) -> Result<String, CliError> {
    let mut text = String::new();
    for policy in policies {
        let yaml = serde_yaml::to_string(policy)
            .map_err(|error| CliError::failed(format!("the policy has no YAML form: {error}")))?;
        if !text.is_empty() {
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

fn table(found: &Access, wide: bool) -> Table {
    let all = |values: &[String]| if values.is_empty() { "*".to_owned() } else { values.join(",") };
    let row = |row: &AccessRow| {
        let by = if row.allowed_by.is_empty() { "-".to_owned() } else { row.allowed_by.clone() };
        let mut cells = vec![row.client.clone(), name(&row.destination)];
        if wide {
            cells.push(row.destination.kind.clone());
        }
        cells.extend([all(&row.methods), all(&row.paths), by, row.seen.to_string()]);
        cells
    };
    let mut headers = vec!["CLIENT", "DESTINATION"];
    if wide {
        headers.push("KIND");
    }
    headers.extend(["METHODS", "PATHS", "ALLOWED BY", "LAST HOUR"]);
    Table { headers, rows: found.rows.iter().map(row).collect() }
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
    use serde_json::json;

    use super::*;

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
    fn suggestions_are_documents_that_kubectl_takes() {
        let policy =
            |name: &str| json!({"kind": "MeshPolicy", "metadata": {"name": name, "namespace": "shop"}});
        let policies = [policy("a"), policy("b")];
        let text = documents(&policies).unwrap();
        assert_eq!(text.matches("---\n").count(), 1);
        assert_eq!(text.matches("kind: MeshPolicy").count(), 2);
        assert_eq!(name_of(&policies[0]), "shop/a\n");
    }
}
