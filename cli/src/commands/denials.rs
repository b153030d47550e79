//! `tulle denials`: single requests and connections that access rules or Strict mTLS refused.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tulle_mesh::query::{DenialRow, Denials, Paths, Stat};

use super::{edges, explain, stat};
use crate::cluster::Context;
use crate::exists;
use crate::exit::{self, CliError};
use crate::human;
use crate::output::{Format, Table};

/// How long the operator keeps denials, and what it has counted.
const KEPT: Duration = Duration::from_secs(21_600);

/// Options of `tulle denials`.
#[derive(clap::Args)]
pub struct Args {
    /// The workload whose sidecars refused, as NAME, KIND/NAME or NAMESPACE/NAME; all of the namespace if absent
    #[arg(value_name = "WORKLOAD")]
    workload: Option<String>,
}

/// Runs `tulle denials`.
///
/// # Errors
/// The workload does not exist, or the operator gave no answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let (own, output) = (context.namespace(), &context.output);
    let workload = args.workload.as_deref().map(|text| explain::workload(text, own)).transpose()?;
    if let Some((namespace, _)) = &workload {
        explain::visible(context, namespace)?;
    }
    let namespace = workload.as_ref().map(|(namespace, _)| namespace.as_str()).or(own);
    let name = workload.as_ref().map(|(_, name)| name.as_str());
    let optional = [("namespace", namespace), ("name", name)];
    let asked: Vec<(&str, &str)> =
        optional.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let operator = context.operator().await?;
    let found: Denials = operator.get(Paths::DENIALS, &asked).await?;
    let mut notes = notes(&found);
    if found.rows.is_empty() && found.leader {
        if let (Some(namespace), Some(name)) = (namespace, name) {
            exists::named(context, &exists::WORKLOADS, namespace, name).await?;
        }
        let window = KEPT.as_secs().to_string();
        let mut parameters = vec![("by", "workload"), ("window", window.as_str())];
        parameters.extend(&asked);
        let counted: Stat = operator.get(Paths::STAT, &parameters).await?;
        notes.push(nothing(&counted, namespace, name));
    }
    let now = Timestamp::now().as_millisecond();
    output.print(&found, |wide| match output.format {
        Format::Name => ids(&found),
        _ => table(&found, own, wide, now),
    })?;
    notes.iter().for_each(|note| exit::note(&format!("note: {note}")));
    if !found.rows.is_empty() && matches!(output.format, Format::Table | Format::Wide) {
        let namespace = namespace.unwrap_or("NAMESPACE");
        exit::note(&format!(
            "hint: tulle explain --denial ID -n {namespace} shows what would become of the request now"
        ));
    }
    Ok(())
}

/// What the list lacks.
fn notes(found: &Denials) -> Vec<String> {
    let mut notes = Vec::new();
    if !found.leader {
        notes.push(
            "this replica of the operator does not lead, and sidecars report single denials to the leader: those of the last \
             seconds may be missing"
                .to_owned(),
        );
    }
    if found.dropped > 0 {
        let more =
            if found.dropped == 1 { "1 more was".to_owned() } else { format!("{} more were", found.dropped) };
        notes.push(format!(
            "{more} refused and not listed: a sidecar reports the last 5 of five seconds, and a list has the latest 200"
        ));
    }
    if found.rows.iter().any(|row| row.caller.is_none()) {
        notes.push("callers of other namespaces are hidden; -A shows them to whoever may see all".to_owned());
    }
    notes
}

/// Why nothing is listed, by what was counted in the same time.
fn nothing(counted: &Stat, namespace: Option<&str>, name: Option<&str>) -> String {
    let place = match (name, namespace) {
        (Some(name), _) => format!("at {name}"),
        (None, Some(namespace)) => format!("in namespace {namespace}"),
        (None, None) => "in any namespace".to_owned(),
    };
    let window = human::age(Duration::from_secs(counted.window));
    let denied: u64 = counted.rows.iter().map(|row| row.golden.denied).sum();
    if denied > 0 {
        return format!(
            "{denied} requests and connections were denied {place} in the last {window}, but none of them can be listed: \
             what a limit refuses has no id, and a leader that crashes loses those of its last seconds"
        );
    }
    if !counted.rows.iter().any(|row| row.meshed.is_some_and(|meshed| meshed.with > 0)) {
        return stat::nothing(namespace, KEPT);
    }
    format!("nothing was denied {place} in the last {window}")
}

/// The ids alone, as `tulle explain --denial` takes them.
fn ids(found: &Denials) -> Table {
    Table { headers: vec!["ID"], rows: found.rows.iter().map(|row| vec![row.id.clone()]).collect() }
}

/// `own` is the namespace that is looked at, `now` in milliseconds since 1970.
fn table(found: &Denials, own: Option<&str>, wide: bool, now: i64) -> Table {
    let mut headers = Vec::new();
    if own.is_none() {
        headers.push("NAMESPACE");
    }
    headers.extend(["TIME", "WORKLOAD", "CALLER", "REQUEST", "POLICY", "RULE", "ID"]);
    if wide {
        headers.extend(["AGE", "KIND", "REPLAY"]);
    }
    let rows = found.rows.iter().map(|row| {
        let mut cells = Vec::with_capacity(headers.len());
        if own.is_none() {
            cells.push(row.workload.namespace.clone());
        }
        cells.extend([
            time(row.at_unix_ms),
            row.workload.name.clone(),
            row.caller.as_ref().map_or_else(|| "hidden".to_owned(), |caller| edges::party(caller, own)),
            request(row),
            if row.policy.is_empty() { human::UNKNOWN.to_owned() } else { row.policy.clone() },
            row.rule.clone(),
            row.id.clone(),
        ]);
        if wide {
            let ago = u64::try_from(now.saturating_sub(row.at_unix_ms)).unwrap_or(0);
            cells.extend([
                human::age(Duration::from_millis(ago)),
                row.workload.kind.clone(),
                format!("tulle explain --denial {} -n {}", row.id, row.workload.namespace),
            ]);
        }
        cells
    });
    Table { rows: rows.collect(), headers }
}

/// The time of day, in UTC.
fn time(unix_ms: i64) -> String {
    Timestamp::from_millisecond(unix_ms)
        .map_or_else(|_| human::UNKNOWN.to_owned(), |at| at.strftime("%H:%M:%S").to_string())
}

fn request(row: &DenialRow) -> String {
    if row.method.is_empty() {
        return "opaque connection".to_owned();
    }
    format!("{} {}{}", row.method, row.path, if row.cut { " (cut)" } else { "" })
}

#[cfg(test)]
mod tests {
    use tulle_mesh::query::{Golden, Meshed, Party, StatRow};

    use super::*;

    fn party(namespace: &str, kind: &str, name: &str) -> Party {
        Party { namespace: namespace.into(), kind: kind.into(), name: name.into() }
    }

    fn found() -> Denials {
        let denied = DenialRow {
            id: "0123456789abcdef".into(),
            at_unix_ms: 3_661_500,
            workload: party("shop", "Deployment", "web"),
            caller: Some(party("pay", "ServiceAccount", "cart")),
            method: "POST".into(),
            path: "/orders".into(),
            cut: false,
            policy: "guarded".into(),
            rule: "DenyRule(0)".into(),
        };
        let opaque = DenialRow { caller: None, method: String::new(), path: String::new(), ..denied.clone() };
        let strict = DenialRow {
            caller: Some(party("", "Plain", "")),
            cut: true,
            policy: String::new(),
            rule: "Plaintext".into(),
            ..denied.clone()
        };
        Denials { leader: true, dropped: 0, rows: vec![denied, opaque, strict] }
    }

    #[test]
    fn a_denial_is_a_row_with_its_caller_rule_and_id() {
        let expected = "\
TIME       WORKLOAD   CALLER     REQUEST              POLICY    RULE          ID
01:01:01   web        pay/cart   POST /orders         guarded   DenyRule(0)   0123456789abcdef
01:01:01   web        hidden     opaque connection    guarded   DenyRule(0)   0123456789abcdef
01:01:01   web        plain      POST /orders (cut)   -         Plaintext     0123456789abcdef
";
        assert_eq!(table(&found(), Some("shop"), false, 0).to_string(), expected);
        let wide = table(&found(), None, true, 3_666_500);
        assert_eq!((wide.headers[0], wide.rows[0][0].as_str()), ("NAMESPACE", "shop"));
        let replay = "tulle explain --denial 0123456789abcdef -n shop";
        assert_eq!(wide.rows[0][8..], ["5s", "Deployment", replay]);
        assert!(wide.rows.iter().all(|row| row.len() == wide.headers.len()));
        assert_eq!(ids(&found()).names(), "0123456789abcdef\n".repeat(3));
    }

    #[test]
    fn json_has_the_same_under_stable_names() {
        let json = serde_json::to_value(found()).unwrap();
        let row = &json["rows"][0];
        assert_eq!((&row["id"], &row["atUnixMs"]), (&"0123456789abcdef".into(), &3_661_500.into()));
        assert_eq!((&row["caller"]["name"], &row["workload"]["name"]), (&"cart".into(), &"web".into()));
        assert_eq!((&row["policy"], &row["rule"]), (&"guarded".into(), &"DenyRule(0)".into()));
        assert!(json["rows"][1].get("caller").is_none(), "{json}");
    }

    #[test]
    fn what_the_list_lacks_is_said() {
        let hidden = ["callers of other namespaces are hidden; -A shows them to whoever may see all"];
        assert_eq!(notes(&found()), hidden);
        let other = notes(&Denials { leader: false, dropped: 7, rows: Vec::new() });
        assert_eq!(other.len(), 2);
        assert!(
            other[0].contains("does not lead") && other[1].starts_with("7 more were refused"),
            "{other:?}"
        );
    }

    #[test]
    fn an_empty_list_says_why() {
        let of = |denied: u64, with: u32| {
            let golden = Golden { denied, ..Golden::default() };
            let row = StatRow { golden, meshed: Some(Meshed { with, of: 2 }), ..StatRow::default() };
            Stat { window: 2_400, lost: 0, rows: vec![row] }
        };
        let says = |counted: &Stat, name| nothing(counted, Some("shop"), name);
        assert_eq!(says(&of(0, 1), Some("web")), "nothing was denied at web in the last 40m");
        assert_eq!(says(&of(0, 1), None), "nothing was denied in namespace shop in the last 40m");
        let counted = says(&of(3, 1), Some("web"));
        assert!(
            counted.starts_with("3 requests and connections were denied at web in the last 40m"),
            "{counted}"
        );
        assert!(counted.contains("what a limit refuses has no id"), "{counted}");
        for bare in [of(0, 0), Stat::default()] {
            assert!(says(&bare, Some("web")).starts_with("no sidecar has counted this"));
        }
    }
}
