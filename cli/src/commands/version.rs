//! `tulle version`: versions of this program and of the operator.

use serde::Serialize;
use tulle_mesh::query::{Health, Paths};

use crate::cluster::{Context, Operator, TOKEN_LIFETIME};
use crate::exit::CliError;
use crate::output::Table;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Options of `tulle version`.
#[derive(clap::Args)]
pub struct Args {
    /// Only the version of this program: asks no cluster
    #[arg(long)]
    client: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    client: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    operator: Option<Health>,
}

/// Runs `tulle version`. The version of this program is printed even if the operator gives no answer. Whoever may not ask
/// it in this namespace gets a note.
///
/// # Errors
/// The operator gave no answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let asked = if args.client { Ok(None) } else { operator(context).await };
    let (operator, failure) = match asked {
        Ok(operator) => (operator, None),
        Err(error) => (None, Some(error)),
    };
    let versions = Versions { client: VERSION, operator };
    context.output.print(&versions, |wide| table(&versions, wide))?;
    failure.map_or(Ok(()), Err)
}

/// The state of the operator. `None`: the user has no token for it, and a note says so.
async fn operator(context: &Context) -> Result<Option<Health>, CliError> {
    let found = context.replicas().await?;
    let token = match context.token(&found.first, TOKEN_LIFETIME).await {
        Ok(token) => token,
        Err(error) => {
            crate::exit::note(&unasked(&error));
            return Ok(None);
        }
    };
    let located = context.leader(found, &token).await?;
    if let Some(note) = located.note() {
        crate::exit::note(&note);
    }
    let operator = Operator::new(context.streams().await?, located, token);
    operator.get(Paths::HEALTH, &[]).await.map(Some)
}

/// Why the operator was not asked.
fn unasked(error: &CliError) -> String {
    format!(
        "note: the operator was not asked for its version: {error}; choose a namespace that you may look at with -n"
    )
}

fn table(versions: &Versions, wide: bool) -> Table {
    let mut table = Table { headers: vec!["COMPONENT", "VERSION"], rows: Vec::new() };
    if wide {
        table.headers.extend(["POD", "LEADS", "SIDECARS"]);
    }
    table.rows.push(vec!["tulle".to_owned(), versions.client.to_owned()]);
    if let Some(operator) = &versions.operator {
        let mut row = vec!["operator".to_owned(), operator.version.clone()];
        if wide {
            let leads = if operator.leader { "yes" } else { "no" };
            row.extend([operator.pod.clone(), leads.to_owned(), operator.sidecars.to_string()]);
        }
        table.rows.push(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_ask_the_operator_is_told_how_to() {
        let note = unasked(&CliError::failed("you may not look at this namespace"));
        assert!(note.contains("you may not look at this namespace; choose a namespace"), "{note}");
    }

    #[test]
    fn both_versions_are_shown_where_both_are_known() {
        let health = Health {
            version: "0.2.0".into(),
            leader: true,
            pod: "tulle-operator-0".into(),
            sidecars: 12,
            ..Health::default()
        };
        let both = Versions { client: "0.1.0", operator: Some(health) };
        let expected = "\
COMPONENT   VERSION   POD                LEADS   SIDECARS
tulle       0.1.0
operator    0.2.0     tulle-operator-0   yes     12
";
        assert_eq!(table(&both, true).to_string(), expected);
        let alone = Versions { client: "0.1.0", operator: None };
        assert_eq!(table(&alone, false).to_string(), "COMPONENT   VERSION\ntulle       0.1.0\n");
    }
}
