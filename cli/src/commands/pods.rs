//! `tulle pods`: sidecars as the operator knows them.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tulle_mesh::query::{Paths, Sidecar, Sidecars};

use crate::cluster::{Context, Operator};
use crate::exit::{self, CliError};
use crate::human;
use crate::output::Table;

/// Arguments of `tulle pods`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs `tulle pods`.
///
/// # Errors
/// The operator cannot be asked.
pub async fn run(context: &Context, _: Args) -> Result<(), CliError> {
    let operator = context.operator().await?;
    let found = sidecars(context, &operator).await?;
    let leads = operator.at().leads;
    let now = Timestamp::now().as_second();
    let all_namespaces = context.namespace().is_none();
    context.output.print(&found, |is_wide| table(&found.sidecars, leads, all_namespaces, is_wide, now))?;
    if let Some(line) = without(&found.without) {
        exit::note(&line);
    }
    Ok(())
}

/// The sidecars of the namespace that was asked for.
async fn sidecars(context: &Context, operator: &Operator) -> Result<Sidecars, CliError> {
    match context.namespace() {
        Some(namespace) => operator.get(Paths::SIDECARS, &[("namespace", namespace)]).await,
        None => operator.get(Paths::SIDECARS, &[]).await,
    }
}

/// A row for each sidecar. `leads`: the replica that answered does, and so has heard of every connected one. `now` in Unix
/// seconds.
fn table(sidecars: &[Sidecar], leads: bool, all_namespaces: bool, is_wide: bool, now: i64) -> Table {
    let mut headers =
        vec!["POD", "VERSION", "CONFIG", "BEHIND", "REFUSED", "CERT-LEFT", "CONNECTED", "OPERATOR", "MEM"];
    if is_wide {
        headers.extend(["WORKLOAD", "REASON"]);
    }
    if all_namespaces {
        headers.insert(0, "NAMESPACE");
    }
    let row = |sidecar: &Sidecar| {
        let mut row = vec![
            sidecar.pod.clone(),
            dash(&sidecar.version),
            format!("{}/{}", sidecar.acknowledged, sidecar.resources),
            sidecar.behind_seconds.map_or_else(|| "-".to_owned(), age),
            sidecar.refused.len().to_string(),
            left(sidecar.certificate_not_after, now),
            match (sidecar.connected, leads) {
                (true, _) => "yes",
                (false, true) => "no",
                (false, false) => "-",
            }
            .to_owned(),
            dash(sidecar.operator.as_deref().unwrap_or_default()),
            sidecar.memory_bytes.map_or_else(|| "-".to_owned(), human::bytes),
        ];
        if is_wide {
            row.push(match &sidecar.workload {
                workload if workload.name.is_empty() => "-".to_owned(),
                workload => format!("{}/{}", workload.kind, workload.name),
            });
            row.push(dash(&sidecar.refused.join("; ")));
        }
        if all_namespaces {
            row.insert(0, sidecar.namespace.clone());
        }
        row
    };
    Table { headers, rows: sidecars.iter().map(row).collect() }
}

/// A line about pods that should have a sidecar.
fn without(pods: &[String]) -> Option<String> {
    let (verb, hint) = ("without a sidecar", "a pod gets one when it is created: restart its workload");
    match pods {
        [] => None,
        [one] => Some(format!("1 pod is {verb} although its namespace asks for one: {one}; {hint}")),
        [first, rest @ ..] => Some(format!(
            "{} pods are {verb} although their namespaces ask for one: {first} and {} more; {hint}",
            pods.len(),
            rest.len()
        )),
    }
}

/// How long a certificate is valid; `-`: there is none.
pub(crate) fn left(not_after: Option<i64>, now: i64) -> String {
    match not_after.filter(|not_after| *not_after > 0) {
        None => "-".to_owned(),
        Some(not_after) => match u64::try_from(not_after.saturating_sub(now)) {
            Ok(left) if left > 0 => age(left),
            _ => "expired".to_owned(),
        },
    }
}

fn age(seconds: u64) -> String {
    human::age(Duration::from_secs(seconds))
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::query::Party;

    use super::*;

    fn sidecar(pod: &str) -> Sidecar {
        Sidecar {
            namespace: "shop".into(),
            pod: pod.into(),
            workload: Party { namespace: "shop".into(), kind: "Deployment".into(), name: "web".into() },
            version: "0.5.0".into(),
            connected: true,
            acknowledged: 12,
            resources: 12,
            certificate_not_after: Some(1_000 + 7_200),
            operator: Some("tulle-operator-0".into()),
            memory_bytes: Some(9_437_184),
            ..Sidecar::default()
        }
    }

    #[test]
    fn a_sidecar_that_lags_refuses_or_was_never_heard_of_is_seen_in_its_row() {
        let behind = Sidecar {
            acknowledged: 11,
            behind_seconds: Some(42),
            refused: vec!["MeshPolicy/shop/calm: no".into()],
            ..sidecar("web-b")
        };
        let silent = Sidecar { namespace: "shop".into(), pod: "web-c".into(), ..Sidecar::default() };
        let expected = "\
POD     VERSION   CONFIG   BEHIND   REFUSED   CERT-LEFT   CONNECTED   OPERATOR           MEM
web-a   0.5.0     12/12    -        0         120m        yes         tulle-operator-0   9.4MB
web-b   0.5.0     11/12    42s      1         120m        yes         tulle-operator-0   9.4MB
web-c   -         0/0      -        0         -           no          -                  -
";
        let found = [sidecar("web-a"), behind, silent];
        assert_eq!(table(&found, true, false, false, 1_000).to_string(), expected);
        let of_a_follower = expected.replace("no          -", "-           -");
        assert_eq!(table(&found, false, false, false, 1_000).to_string(), of_a_follower);
    }

    #[test]
    fn the_wide_table_of_all_namespaces_says_where_and_why() {
        let refused = Sidecar { refused: vec!["a".into(), "b".into()], ..sidecar("web-a") };
        let table = table(&[refused], true, true, true, 1_000);
        assert_eq!(table.headers.first(), Some(&"NAMESPACE"));
        assert_eq!(table.rows[0].last().unwrap(), "a; b");
        assert_eq!(table.names(), "shop/web-a\n");
    }

    #[test]
    fn a_certificate_that_has_ended_is_expired() {
        assert_eq!(left(Some(1_000), 1_000), "expired");
        assert_eq!(left(Some(0), 1_000), "-");
        assert_eq!(left(None, 1_000), "-");
    }

    #[test]
    fn pods_without_a_sidecar_are_counted_and_one_is_named() {
        assert_eq!(without(&[]), None);
        assert!(without(&["shop/a".into()]).unwrap().starts_with("1 pod is without a sidecar"));
        let several = without(&["shop/a".into(), "shop/b".into(), "shop/c".into()]).unwrap();
        assert!(several.starts_with("3 pods") && several.contains("shop/a and 2 more"), "{several}");
    }
}
