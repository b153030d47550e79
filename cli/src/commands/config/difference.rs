//! What a sidecar has, compared with what the operator knows of it and with the resources that it would send now.
//!
//! In: answers of the sidecar's admin port and of the operator's query API: first versions, then the contents of the
//! resources in which these differ. Out: lines. No discovery stream is opened: the operator compiles the resources for the
//! answer.

use std::collections::HashSet;

use kube::Client;
use serde::Serialize;
use serde_json::Value;
use tulle_mesh::check::LATE;
use tulle_mesh::ports;
use tulle_mesh::query::{Paths, Sidecar, Sidecars};
use tulle_mesh::resources::{self, Described, Resources};

use super::compare::{Comparison, Difference, How, compare, differing};
use super::content::Reader;
use super::forward;
use crate::cluster::{Context, Operator};
use crate::commands::pods;
use crate::exit::{self, CliError};
use crate::output::Table;

/// A line of `--diff`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Line {
    pub(super) what: String,
    pub(super) sidecar: String,
    pub(super) operator: String,
    pub(super) same: bool,
}

/// Runs `tulle config --diff`. `config` is what the sidecar answers to `/config`, `now` in Unix seconds.
pub(super) async fn diff(
    context: &Context,
    namespace: &str,
    pod: &str,
    config: &Value,
    now: i64,
) -> Result<(), CliError> {
    let operator = context.operator().await?;
    let known: Sidecars = operator.get(Paths::SIDECARS, &[("namespace", namespace)]).await?;
    let known = known.sidecars.into_iter().find(|known| known.namespace == namespace && known.pod == pod);
    let Some(known) = known else {
        let what = format!("the operator does not know the sidecar of {namespace}/{pod}, which answers");
        return Err(CliError::failed(what).hint("tulle check says whether the operator runs"));
    };
    let mut lines = lines(config, &known, now);
    let is_connected = is_connected(config);
    let note = match contents(context, &operator, &known).await? {
        Contents::Compared(found) => {
            lines.extend(shown(&found));
            found.note(&known, is_connected, &operator.at().pod)
        }
        Contents::Unknown(why) => Some(why.to_owned()),
    };
    note.iter().for_each(|note| exit::note(note));
    context.output.print(&lines, |_| {
        let row = |line: &Line| {
            let same = if line.same { "yes" } else { "no" };
            vec![line.what.clone(), line.sidecar.clone(), line.operator.clone(), same.to_owned()]
        };
        Table { headers: vec!["WHAT", "SIDECAR", "OPERATOR", "SAME"], rows: lines.iter().map(row).collect() }
    })
}

/// Whether the sidecar has a stream to some replica of the operator, as it says itself.
fn is_connected(config: &Value) -> bool {
    config.get("operatorConnected").and_then(Value::as_bool).unwrap_or(false)
}

/// What the sidecar has, beside what the operator knows of it. `now` in Unix seconds.
pub(super) fn lines(config: &Value, known: &Sidecar, now: i64) -> Vec<Line> {
    let connection = |is: bool| if is { "connected" } else { "not connected" }.to_owned();
    let line = |what: &str, sidecar: String, operator: String| {
        let same = sidecar == operator;
        Line { what: what.to_owned(), sidecar, operator, same }
    };
    let version = config.get("version").and_then(Value::as_str).unwrap_or("-").to_owned();
    let is_connected = is_connected(config);
    let not_after = config.get("certificateNotAfter").and_then(Value::as_i64);
    let mut lines = vec![
        line(
            "version",
            version,
            if known.version.is_empty() { "-".to_owned() } else { known.version.clone() },
        ),
        line("stream", connection(is_connected), connection(known.connected)),
        line("certificate", pods::left(not_after, now), pods::left(known.certificate_not_after, now)),
        line(
            "resources",
            format!("{} acknowledged", known.acknowledged),
            match known.behind_seconds {
                Some(behind) => format!("{} sent, the oldest waits for {behind} s", known.resources),
                None => format!("{} sent", known.resources),
            },
        ),
    ];
    if let Some(resources) = lines.last_mut() {
        resources.same = known.acknowledged == known.resources;
    }
    let refused = known.refused.iter().map(|why| Line {
        what: "refused".to_owned(),
        sidecar: why.clone(),
        operator: "sent".to_owned(),
        same: false,
    });
    lines.extend(refused);
    lines
}

/// Whether the contents could be compared.
enum Contents {
    /// They were.
    Compared(Compared),
    /// One side does not show them; why not.
    Unknown(&'static str),
}

/// Resources of both sides, compared.
struct Compared {
    /// How many the sidecar has that the operator can know of.
    sidecar: usize,
    /// How many the operator would send.
    operator: usize,
    /// How many the sidecar has of which the operator does not know whether it has subscribed to them.
    unknown: usize,
    comparison: Comparison,
}

impl Compared {
    /// What the reader must know: whether the differences may be gone at the next look, and what was not compared.
    /// `is_connected`: as the sidecar says itself. `replica`: the pod of the operator that was asked.
    fn note(&self, known: &Sidecar, is_connected: bool, replica: &str) -> Option<String> {
        if self.unknown == 0 && self.comparison.differences.is_empty() {
            return None;
        }
        let logs = format!("`kubectl -n {} logs {} -c tulle-proxy`", known.namespace, known.pod);
        Some(match known.behind_seconds {
            _ if !is_connected => format!(
                "note: the sidecar is not connected, so it enforces what it had until it is; {logs} shows why"
            ),
            _ if !known.connected => format!(
                "note: the sidecar is connected to another replica than pod {replica}, or since a moment ago: pod \
                 {replica} does not know what it has subscribed to"
            ),
            Some(behind) if behind > LATE.unsigned_abs() => {
                format!("note: the sidecar has not acknowledged for {behind} s what it was sent; {logs} shows why")
            }
            _ => "note: a change takes a few seconds to reach a sidecar: compare again, and look at what still \
                  differs"
                .to_owned(),
        })
    }
}

/// Parts the sidecar's resources into those that are compared, and the number of others: what a pod dials is only known
/// to the operator while the sidecar is connected, so that without a stream nothing follows from what it lacks.
fn comparable(
    sidecar: Vec<Described>,
    operator: &[Described],
    is_connected: bool,
) -> (Vec<Described>, usize) {
    let known: HashSet<String> = operator.iter().map(Described::key).collect();
    let is_dialled = |found: &Described| matches!(found.kind.as_str(), "route" | "endpoints");
    let all = sidecar.len();
    let mut compared = sidecar;
    compared.retain(|found| is_connected || !is_dialled(found) || known.contains(&found.key()));
    let unknown = all - compared.len();
    (compared, unknown)
}

async fn contents(context: &Context, operator: &Operator, known: &Sidecar) -> Result<Contents, CliError> {
    let (namespace, pod) = (known.namespace.as_str(), known.pod.as_str());
    let client = context.streams().await?;
    let Some(mut here) = of_sidecar(&client, namespace, pod, &[]).await? else {
        return Ok(Contents::Unknown(
            "the contents of resources are not compared: the sidecar is of an earlier version, which does not show them; restart the pod to update it",
        ));
    };
    let mut parameters = vec![("namespace", namespace), ("pod", pod)];
    let mut there: Resources = match operator.get::<Resources>(Paths::RESOURCES, &parameters).await {
        Err(error) if is_unknown_path(&error) => {
            return Ok(Contents::Unknown(
                "the contents of resources are not compared: the operator is of an earlier version, which does not answer them; tulle upgrade",
            ));
        }
        answer => answer?,
    };
    let asked = differing(&here.resources, &there.resources);
    if !asked.is_empty() {
        // All of it again, because versions may have changed in between.
        here = of_sidecar(&client, namespace, pod, &asked).await?.unwrap_or(here);
        parameters.extend(asked.iter().map(|key| ("resource", key.as_str())));
        there = operator.get(Paths::RESOURCES, &parameters).await?;
    }
    let reader = Reader::new();
    let (compared, unknown) = comparable(here.resources, &there.resources, known.connected);
    let comparison = compare(&compared, &there.resources, |described| reader.read(described));
    let (sidecar, operator) = (compared.len(), there.resources.len());
    Ok(Contents::Compared(Compared { sidecar, operator, unknown, comparison }))
}

/// The resources of a sidecar, and the contents of those that are asked for. `None`: it does not show them.
async fn of_sidecar(
    client: &Client,
    namespace: &str,
    pod: &str,
    asked: &[String],
) -> Result<Option<Resources>, CliError> {
    let path = path(asked);
    let Some(answer) = forward::find(client, namespace, pod, ports::ADMIN, &path).await? else {
        return Ok(None);
    };
    serde_json::from_slice(&answer).map(Some).map_err(|error| {
        CliError::failed(format!("the sidecar of {namespace}/{pod} answers with invalid JSON: {error}"))
    })
}

/// The path of the sidecar's answer. Keys are not escaped: they have only what a query may have.
fn path(asked: &[String]) -> String {
    let parameters: Vec<String> = asked.iter().map(|key| format!("resource={key}")).collect();
    match parameters.as_slice() {
        [] => resources::PATH.to_owned(),
        all => format!("{}?{}", resources::PATH, all.join("&")),
    }
}

/// Whether the error is the answer of an operator that does not have the path.
fn is_unknown_path(error: &CliError) -> bool {
    let CliError::Failed { what, .. } = error else { return false };
    what.starts_with("unknown path") || what.ends_with("it is older than this program")
}

/// A line that counts, one for each difference, and those that count what is left out.
fn shown(Compared { sidecar, operator, unknown, comparison }: &Compared) -> Vec<Line> {
    let mut lines = vec![Line {
        what: "contents".to_owned(),
        sidecar: format!("{sidecar} resources"),
        operator: format!("{operator} resources"),
        same: comparison.differences.is_empty(),
    }];
    for difference in &comparison.differences {
        lines.extend(lines_of(difference));
    }
    if comparison.more > 0 {
        lines.push(differs(format!("and {} more resources", comparison.more), "-", "-"));
    }
    if *unknown > 0 {
        lines.push(differs(format!("{unknown} resources of dialled addresses"), "present", "not known"));
    }
    lines
}

fn lines_of(Difference { resource, how }: &Difference) -> Vec<Line> {
    match how {
        How::OnlySidecar => vec![differs(resource.clone(), "present", "absent")],
        How::OnlyOperator => vec![differs(resource.clone(), "absent", "present")],
        How::Versions { sidecar, operator } => {
            let what = format!("{resource}: content not shown");
            vec![differs(what, &format!("version {sidecar}"), &format!("version {operator}"))]
        }
        How::Fields { fields, more } => {
            let field = |path: &str, sidecar: &str, operator: &str| {
                differs(format!("{resource}: {path}"), sidecar, operator)
            };
            let found = fields.iter().map(|found| field(&found.path, &found.sidecar, &found.operator));
            let rest = (*more > 0).then(|| field(&format!("and {more} more fields"), "-", "-"));
            found.chain(rest).collect()
        }
    }
}

fn differs(what: String, sidecar: &str, operator: &str) -> Line {
    Line { what, sidecar: sidecar.to_owned(), operator: operator.to_owned(), same: false }
}

#[cfg(test)]
mod tests {
    use super::super::compare::Field;
    use super::*;

    fn compared(unknown: usize, comparison: Comparison) -> Compared {
        Compared { sidecar: 1, operator: 1, unknown, comparison }
    }

    fn difference(resource: &str, how: How) -> Difference {
        Difference { resource: resource.to_owned(), how }
    }

    #[test]
    fn each_difference_is_a_line_and_what_is_left_out_is_counted() {
        let field = Field { path: "mtls.mode".into(), sidecar: "OFF".into(), operator: "STRICT".into() };
        let versions = How::Versions { sidecar: "a".into(), operator: "b".into() };
        let comparison = Comparison {
            differences: vec![
                difference("mtls", How::Fields { fields: vec![field], more: 2 }),
                difference("route 10.0.0.1:80", How::OnlySidecar),
                difference("route 10.0.0.2:80", How::OnlyOperator),
                difference("route 10.0.0.3:80", versions),
            ],
            more: 7,
        };
        let lines = shown(&Compared { sidecar: 1, operator: 0, unknown: 3, comparison });
        let rows: Vec<_> = lines.iter().map(|l| (&*l.what, &*l.sidecar, &*l.operator)).collect();
        let expected = [
            ("contents", "1 resources", "0 resources"),
            ("mtls: mtls.mode", "OFF", "STRICT"),
            ("mtls: and 2 more fields", "-", "-"),
            ("route 10.0.0.1:80", "present", "absent"),
            ("route 10.0.0.2:80", "absent", "present"),
            ("route 10.0.0.3:80: content not shown", "version a", "version b"),
            ("and 7 more resources", "-", "-"),
            ("3 resources of dialled addresses", "present", "not known"),
        ];
        assert_eq!(rows, expected);
        assert!(lines.iter().all(|line| !line.same));
        let equal = compared(0, Comparison::default());
        assert!(shown(&equal).iter().all(|line| line.same));
    }

    #[test]
    fn what_only_a_stream_would_tell_the_operator_is_compared_while_there_is_one() {
        let found = |kind: &str, name: &str| Described {
            kind: kind.into(),
            name: name.into(),
            ..Described::default()
        };
        let sidecar =
            || vec![found("endpoints", "shop/web:80"), found("mtls", "uid"), found("route", "10.0.0.1:80")];
        let there = [found("endpoints", "shop/web:80"), found("workload", "uid")];
        let (compared, unknown) = comparable(sidecar(), &there, false);
        let keys: Vec<String> = compared.iter().map(Described::key).collect();
        assert_eq!((keys, unknown), (vec!["endpoints/shop/web:80".to_owned(), "mtls/uid".to_owned()], 1));
        assert_eq!(comparable(sidecar(), &there, true), (sidecar(), 0));
    }

    #[test]
    fn a_difference_that_may_be_on_its_way_is_told_from_one_that_lasts() {
        let differing = || Comparison {
            differences: vec![difference("mtls", How::OnlySidecar)],
            ..Comparison::default()
        };
        let known = |connected, behind_seconds| Sidecar {
            namespace: "shop".into(),
            pod: "web-1".into(),
            connected,
            behind_seconds,
            ..Sidecar::default()
        };
        let note = |known: &Sidecar, is_connected| compared(0, differing()).note(known, is_connected, "op-1");
        for behind in [None, Some(2), Some(30)] {
            let said = note(&known(true, behind), true).unwrap();
            assert!(said.ends_with("compare again, and look at what still differs"), "{said}");
        }
        let said = note(&known(true, Some(31)), true).unwrap();
        assert!(said.contains("for 31 s") && said.contains("kubectl -n shop logs web-1"), "{said}");
        let said = note(&known(false, None), false).unwrap();
        assert!(said.contains("it enforces what it had until it is"), "{said}");
        let said = note(&known(false, None), true).unwrap();
        assert!(said.contains("another replica than pod op-1"), "{said}");
        let equal = |unknown| compared(unknown, Comparison::default());
        assert_eq!(equal(0).note(&known(true, None), true, "op-1"), None);
        assert!(equal(1).note(&known(false, None), true, "op-1").is_some());
    }

    #[test]
    fn a_sidecar_is_asked_for_the_contents_of_the_resources_that_differ() {
        assert_eq!(path(&[]), "/config/resources");
        let asked = ["endpoints/shop/web:80/ipv6", "route/[fd00::1]:80"].map(str::to_owned);
        let expected = "/config/resources?resource=endpoints/shop/web:80/ipv6&resource=route/[fd00::1]:80";
        assert_eq!(path(&asked), expected);
        let uri: hyper::Uri = expected.parse().unwrap();
        assert_eq!(uri.query().map(|query| query.split('&').count()), Some(2));
    }

    #[test]
    fn an_earlier_operator_is_told_from_a_refusal() {
        for (what, expected) in [
            ("unknown path; this operator answers /api/v1/stat", true),
            ("the operator does not know /api/v1/resources: it is older than this program", true),
            ("system:serviceaccount:shop:default may not see namespace payments", false),
        ] {
            assert_eq!(is_unknown_path(&CliError::failed(what)), expected, "{what}");
        }
    }
}
