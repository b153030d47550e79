//! `/canaries` and `/canary/{namespace}/{name}`: rollouts, and the evidence behind the judge's sentence.
//!
//! Nothing here changes a rollout: the operator has no right to write to Canaries, and must not get one for a page. Each
//! page shows the commands that do, and where `tulle dashboard` acts for its user, it leads to the forms of
//! [`super::action`].

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use maud::{Markup, html};
use tulle_crds::{
    Canary, CanaryAction, CanarySpec, CanaryStatus, CanaryVerdict, Phase, RolloutOutcome, Step,
};
use tulle_mesh::query::{Evidence, PodAttempts, VersionAttempts};

use super::action::{buttons, possible};
use super::layout::{Page, View, columns, page};
use super::words::{NONE, address, command, count, latency, percent, scoped};

/// The factor of an interval that holds the true value with 99 %.
const Z: f64 = 2.576;

const WIDTH: f64 = 640.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;

/// The page with all Canaries. `only`: the namespace that the token shows.
pub fn canaries(found: &[Canary], only: Option<&str>) -> Markup {
    let around = Page {
        title: "Canaries",
        view: Some(View::Canaries),
        here: "/canaries",
        only,
        commands: vec![scoped(&["tulle", "canary", "list"], only)],
    };
    let live = html! {
        @if found.is_empty() {
            p.empty {
                "There is no Canary"
                @if let Some(namespace) = only { " in namespace " (namespace) }
                ". New versions of workloads are rolled out as Kubernetes does it, without being judged."
            }
        } @else {
            div.scroll tabindex="0" role="region" aria-label="Canaries" {
                table {
                    caption { (count(found.len() as u64)) " Canaries; what needs a person comes first" }
                    (columns(&["Namespace", "Name", "Target", "Phase", "Step", "Weight", "Verdict", "Why"]))
                    tbody { @for canary in found { (row(canary)) } }
                }
            }
        }
    };
    page(&around, &html! {}, &live)
}

/// Puts what needs a person first: failed, paused, in progress, at rest; by namespace and name within each.
pub fn sort(canaries: &mut [Canary]) {
    let urgency = |canary: &Canary| match canary.status.as_ref().map(|status| status.phase) {
        Some(Phase::Failed) => 0,
        Some(Phase::Paused) => 1,
        Some(Phase::Progressing) => 2,
        Some(Phase::Promoting) => 3,
        Some(Phase::Waiting) | None => 4,
        Some(Phase::Stable) => 5,
    };
    canaries.sort_by_cached_key(|canary| {
        (urgency(canary), namespace(canary).to_owned(), name(canary).to_owned())
    });
}

pub(super) fn namespace(canary: &Canary) -> &str {
    canary.metadata.namespace.as_deref().unwrap_or_default()
}

pub(super) fn name(canary: &Canary) -> &str {
    canary.metadata.name.as_deref().unwrap_or_default()
}

fn target(canary: &Canary) -> String {
    format!("{}/{}", canary.spec.target.kind.name(), canary.spec.target.name)
}

/// The phase in lower case, as a word in a sentence.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waiting for its target",
        Phase::Stable => "stable",
        Phase::Progressing => "progressing",
        Phase::Paused => "paused",
        Phase::Promoting => "promoting",
        Phase::Failed => "failed",
    }
}

fn class(phase: Phase) -> &'static str {
    match phase {
        Phase::Failed => "bad",
        Phase::Paused | Phase::Waiting => "warn",
        Phase::Progressing | Phase::Promoting => "busy",
        Phase::Stable => "good",
    }
}

pub(super) fn verdict(verdict: CanaryVerdict) -> &'static str {
    match verdict {
        CanaryVerdict::NotJudged => NONE,
        CanaryVerdict::Undecided => "Undecided",
        CanaryVerdict::Pass => "Pass",
        CanaryVerdict::Fail => "Fail",
        CanaryVerdict::Inconclusive => "Inconclusive",
        CanaryVerdict::FailedBefore => "FailedBefore",
    }
}

fn outcome(outcome: RolloutOutcome) -> &'static str {
    match outcome {
        RolloutOutcome::Promoted => "promoted",
        RolloutOutcome::PromotionStalled => "promotion stalled",
        RolloutOutcome::Failed => "failed",
        RolloutOutcome::Superseded => "superseded",
    }
}

fn time(time: &Time) -> String {
    time.0.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

pub(super) fn or_none(text: &str) -> &str {
    if text.is_empty() { NONE } else { text }
}

fn row(canary: &Canary) -> Markup {
    let status = canary.status.clone().unwrap_or_default();
    html! {
        tr {
            td { (namespace(canary)) }
            th scope="row" { a href=(address(&["canary", namespace(canary), name(canary)])) { (name(canary)) } }
            td { (target(canary)) }
            td { span class={ "state " (class(status.phase)) } { (phase(status.phase)) } }
            td { (or_none(&status.step_summary)) }
            td { (or_none(&status.weight_summary)) }
            td { (verdict(status.verdict)) }
            td { (or_none(&status.evidence_summary)) }
        }
    }
}

/// The page of one Canary. `found`: what its judge decides by; `offers`: the page leads to the actions that are possible.
pub fn canary(canary: &Canary, found: &Evidence, offers: bool, only: Option<&str>) -> Markup {
    let (namespace, name) = (namespace(canary), name(canary));
    let status = canary.status.clone().unwrap_or_default();
    let title = format!("Canary {namespace}/{name}");
    let here = address(&["canary", namespace, name]);
    let mut commands = vec![command(&["tulle", "canary", "status", name, "-n", namespace])];
    let act = |action: &CanaryAction| command(&["tulle", "canary", action.name(), name, "-n", namespace]);
    commands.extend(possible(&status).iter().map(act));
    let around = Page { title: &title, view: Some(View::Canaries), here: &here, only, commands };
    let target = &canary.spec.target;
    let live = html! {
        p {
            "Rolls out " a href=(address(&["workload", namespace, &target.name])) { (target.kind.name()) " " (target.name) }
            ". Phase: " span class={ "state " (class(status.phase)) } { (phase(status.phase)) }
            @if status.verdict != CanaryVerdict::NotJudged { ". Verdict: " strong { (verdict(status.verdict)) } }
            "."
        }
        @if !status.evidence_summary.is_empty() { p.sentence { (status.evidence_summary) } }
        @if offers { (buttons(canary, &status)) }
        (facts(&status))
        section aria-labelledby="evidence" { h2 id="evidence" { "Evidence" } (evidence(found)) }
        section aria-labelledby="steps" { h2 id="steps" { "Steps" } (steps(&canary.spec, &status)) }
        section aria-labelledby="conditions" { h2 id="conditions" { "Conditions" } (conditions(&status)) }
        section aria-labelledby="history" { h2 id="history" { "History" } (history(&status)) }
    };
    page(&around, &html! {}, &live)
}

fn facts(status: &CanaryStatus) -> Markup {
    html! {
        dl.facts {
            dt { "Approved revision" } dd { (or_none(&status.approved_revision)) }
            dt { "Revision rolled out" } dd { (or_none(&status.canary_revision)) }
            dt { "Weight" } dd { (status.weight) " %, acknowledged by every sidecar: " (status.acknowledged_weight) " %" }
            dt { "Started" } dd { (status.started.as_ref().map_or_else(|| NONE.to_owned(), time)) }
        }
    }
}

/// A failure rate and the interval around it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Interval {
    rate: f64,
    low: f64,
    high: f64,
}

impl Interval {
    /// Wilson's interval of the failure rate. `None`: there are no attempts.
    fn of(totals: &VersionAttempts) -> Option<Self> {
        if totals.attempts == 0 {
            return None;
        }
        let n = totals.attempts as f64;
        let rate = (totals.failures as f64 / n).min(1.0);
        let spread = Z * Z / n;
        let centre = (rate + spread / 2.0) / (1.0 + spread);
        let half = Z / (1.0 + spread) * (rate * (1.0 - rate) / n + spread / (4.0 * n)).sqrt();
        Some(Self { rate, low: (centre - half).max(0.0), high: (centre + half).min(1.0) })
    }
}

fn evidence(found: &Evidence) -> Markup {
    html! {
        (totals(found))
        @if has_attempts(found) && !found.pods.is_empty() { (pods(&found.pods)) }
    }
}

fn has_attempts(found: &Evidence) -> bool {
    found.canary.attempts > 0 || found.stable.attempts > 0
}

/// Both versions as a picture and as a table, as the page of the Canary and that of its workload show them.
pub(super) fn totals(found: &Evidence) -> Markup {
    let sides = [("canary", &found.canary), ("stable", &found.stable)];
    html! {
        @if !found.leader {
            p {
                "The replica of the operator that answers does not lead: these counts are those of the Canary's status, which the leader writes every few seconds."
            }
        }
        @if !has_attempts(found) {
            p.empty { "No attempt has been counted: no rollout has begun, its first step has no weight yet, or nobody calls the workload." }
        } @else {
            (picture(&sides))
            table {
                caption {
                    "Attempts in this rollout, over the same seconds for both versions. The interval holds the true failure rate with 99 %; the judge decides by its own tests, in the sentence above."
                }
                thead {
                    tr {
                        th scope="col" { "Version" }
                        th.number scope="col" { "Attempts" }
                        th.number scope="col" { "Failures" }
                        th.number scope="col" { "Unreached" }
                        th.number scope="col" { "4xx" }
                        th.number scope="col" { "Failure rate" }
                        th.number scope="col" { "99 % interval" }
                    }
                }
                tbody {
                    @for (name, totals) in sides {
                        @let interval = Interval::of(totals);
                        tr {
                            th scope="row" { (name) }
                            td.number data-v=(totals.attempts) { (count(totals.attempts)) }
                            td.number data-v=(totals.failures) { (count(totals.failures)) }
                            td.number data-v=(totals.unreached) { (count(totals.unreached)) }
                            td.number data-v=(totals.client_errors) { (count(totals.client_errors)) }
                            td.number data-v=[interval.map(|i| i.rate)] { (percent(interval.map(|i| i.rate))) }
                            td.number data-v=[interval.map(|i| i.low)] {
                                @match interval {
                                    Some(i) => { (percent(Some(i.low))) " to " (percent(Some(i.high))) }
                                    None => { (NONE) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The running block.
fn pods(found: &[PodAttempts]) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label="Attempts by pod" {
            table {
                caption {
                    "Attempts at each pod in the running block of ten seconds. They are part of the counts above. Latencies are times to the head of the answer."
                }
                thead {
                    tr {
                        th scope="col" { "Pod" }
                        th scope="col" { "Version" }
                        th scope="col" { "Revision" }
                        th.number scope="col" { "Attempts" }
                        th.number scope="col" { "Failures" }
                        th.number scope="col" { "Unreached" }
                        th.number scope="col" { "4xx" }
                        th.number scope="col" { "p50" }
                        th.number scope="col" { "p99" }
                    }
                }
                tbody {
                    @for pod in found {
                        tr {
                            th scope="row" { (pod.name) }
                            td { (pod.version) }
                            td { (or_none(&pod.revision)) }
                            td.number data-v=(pod.attempts) { (count(pod.attempts)) }
                            td.number data-v=(pod.failures) { (count(pod.failures)) }
                            td.number data-v=(pod.unreached) { (count(pod.unreached)) }
                            td.number data-v=(pod.client_errors) { (count(pod.client_errors)) }
                            td.number data-v=[pod.p50_ms] { (latency(pod.p50_ms)) }
                            td.number data-v=[pod.p99_ms] { (latency(pod.p99_ms)) }
                        }
                    }
                }
            }
        }
    }
}

/// For each version a bar of its attempts with the failed ones, and its failure rate with the interval around it.
fn picture(sides: &[(&'static str, &VersionAttempts); 2]) -> Markup {
    let most = sides.iter().map(|(_, totals)| totals.attempts).max().unwrap_or_default().max(1) as f64;
    let intervals = sides.map(|(name, totals)| (name, Interval::of(totals)));
    let high = intervals.iter().filter_map(|(_, i)| i.map(|i| i.high)).fold(0.001, f64::max);
    let width = WIDTH - LEFT - RIGHT;
    let x = |part: f64| format!("{:.1}", LEFT + width * part.clamp(0.0, 1.0));
    let length = |part: f64| format!("{:.1}", width * part.clamp(0.0, 1.0));
    html! {
        figure {
            figcaption { "Attempts with their failures, and the failure rate with its 99 % interval" }
            svg viewBox={ "0 0 " (WIDTH) " 186" } role="img" aria-labelledby="evidence-title" {
                title id="evidence-title" { "Attempts and failure rates of both versions; the table below has the numbers" }
                text x="0" y="14" { "Attempts" }
                @for (at, (name, totals)) in sides.iter().enumerate() {
                    @let y = 22.0 + 30.0 * at as f64;
                    text x="0" y=(y + 15.0) { (name) }
                    rect class={ "bar " (name) } x=(x(0.0)) y=(y) height="20"
                        width=(length(totals.attempts as f64 / most)) {}
                    rect.failures x=(x(0.0)) y=(y + 12.0) height="8" width=(length(totals.failures as f64 / most)) {}
                    text x=(LEFT + 6.0) y=(y + 10.0) {
                        (count(totals.attempts)) ", failed " (count(totals.failures))
                    }
                }
                text x="0" y="104" { "Failure rate" }
                @for (at, (name, interval)) in intervals.iter().enumerate() {
                    @let y = 120.0 + 24.0 * at as f64;
                    text x="0" y=(y + 4.0) { (name) }
                    @if let Some(i) = interval {
                        line.interval x1=(x(i.low / high)) x2=(x(i.high / high)) y1=(y) y2=(y) {}
                        circle class={ "rate " (name) } cx=(x(i.rate / high)) cy=(y) r="5" {}
                    } @else {
                        text x=(LEFT) y=(y + 4.0) { "no attempts" }
                    }
                }
                line.axis x1=(x(0.0)) x2=(x(1.0)) y1="162" y2="162" {}
                text x=(x(0.0)) y="178" { "0 %" }
                text x=(x(1.0)) y="178" text-anchor="end" { (percent(Some(high))) }
            }
        }
    }
}

/// A step in words.
fn step(step: &Step) -> String {
    let hold = step.hold.as_deref().unwrap_or("2m");
    if step.pause.is_some() {
        "Pause until it is resumed".to_owned()
    } else if let Some(weight) = step.weight {
        format!("{weight} % of the traffic, for at least {hold}")
    } else if let Some(mirror) = step.mirror {
        format!("Copies of {mirror} % of the reading requests, for at least {hold}")
    } else {
        let one = |of: &tulle_crds::StepMatch| match (&of.header, &of.cookie) {
            (Some(header), _) => format!("header {}: {}", header.name, header.exact),
            (None, Some(cookie)) => format!("cookie {}={}", cookie.name, cookie.exact),
            (None, None) => NONE.to_owned(),
        };
        let all: Vec<String> = step.match_.iter().map(one).collect();
        format!("Requests with {}, for at least {hold}", all.join(" or "))
    }
}

fn steps(spec: &CanarySpec, status: &CanaryStatus) -> Markup {
    let steps = crate::rollout::machine::steps(spec);
    let running = matches!(status.phase, Phase::Progressing | Phase::Paused | Phase::Failed);
    let present = usize::try_from(status.step).ok().filter(|_| running);
    html! {
        ol.steps {
            @for (at, one) in steps.iter().enumerate() {
                li aria-current=[(present == Some(at)).then_some("step")] {
                    (step(one))
                    @if present == Some(at) {
                        " " strong { @if status.phase == Phase::Failed { "(it ended here)" } @else { "(now)" } }
                    } @else if present.is_some_and(|present| at < present) {
                        " (done)"
                    }
                }
            }
        }
    }
}

fn conditions(status: &CanaryStatus) -> Markup {
    html! {
        @if status.conditions.is_empty() {
            p.empty { "The operator has not written a condition yet." }
        } @else {
            table {
                caption { "Conditions of the Canary" }
                (columns(&["Condition", "Status", "Reason", "Message"]))
                tbody {
                    @for condition in &status.conditions {
                        tr {
                            th scope="row" { (condition.type_) }
                            td { (condition.status) }
                            td { (condition.reason) }
                            td { (condition.message) }
                        }
                    }
                }
            }
        }
    }
}

fn history(status: &CanaryStatus) -> Markup {
    html! {
        @if status.history.is_empty() {
            p.empty { "No rollout has ended yet." }
        } @else {
            table {
                caption { "The last rollouts, the newest first" }
                (columns(&["Ended", "Revision", "Outcome", "Why"]))
                tbody {
                    @for entry in &status.history {
                        tr {
                            th scope="row" { (time(&entry.ended)) }
                            td { (entry.revision) }
                            td { (outcome(entry.outcome)) }
                            td { (entry.because) }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;
    use crate::model::Key;
    use crate::rollout::answer;
    use crate::rollout::input::JudgeInput;

    /// The page of a Canary while no block is running.
    fn shown(of: &Canary) -> String {
        let key: Key = (namespace(of).into(), name(of).into());
        let evidence = answer::evidence(|_| None, &key, of, &JudgeInput::default(), true);
        canary(of, &evidence, false, None).into_string()
    }

    fn example(name: &str, status: &Value) -> Canary {
        from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "Canary",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {
                "target": {"kind": "Deployment", "name": "web"},
                "steps": [{"weight": 5, "hold": "1m"}, {"pause": {}}, {"weight": 50}],
            },
            "status": status,
        }))
        .unwrap()
    }

    fn paused() -> Canary {
        example(
            "web",
            &json!({
                "phase": "Paused", "step": 1, "stepSummary": "2/3", "verdict": "Inconclusive",
                "evidenceSummary": "12 of 400 failed <b>here</b>",
                "evidence": {
                    "canary": {"attempts": 400, "failures": 12},
                    "stable": {"attempts": 8000, "failures": 8},
                },
                "history": [{
                    "revision": "5d4f", "outcome": "Promoted", "because": "every step passed",
                    "ended": "2026-01-02T03:04:05Z",
                }],
            }),
        )
    }

    #[test]
    fn a_canary_shows_its_sentence_its_evidence_and_the_present_step() {
        let text = shown(&paused());
        for part in [
            "12 of 400 failed &lt;b&gt;here",
            "400, failed 12",
            "<li aria-current=\"step\">Pause until it is resumed <strong>(now)</strong></li>",
            "5 % of the traffic, for at least 1m (done)",
            "2026-01-02 03:04:05 UTC",
            "every step passed",
            ">8,000<",
            "3.00 %",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains(" style=") && !text.contains("<b>"), "{text}");
    }

    #[test]
    fn a_page_offers_the_commands_that_have_an_effect_and_no_form() {
        let text = shown(&paused());
        for action in ["status", "resume", "promote", "abort"] {
            assert!(text.contains(&format!("<code>tulle canary {action} web -n shop</code>")), "{action}");
        }
        assert!(!text.contains("<form"), "the page changes nothing");
        let stable = shown(&example("web", &json!({"phase": "Stable"})));
        assert!(!stable.contains("tulle canary abort"), "{stable}");
    }

    #[test]
    fn without_attempts_the_evidence_says_why() {
        let text = shown(&example("web", &json!({"phase": "Waiting"})));
        assert!(text.contains("No attempt has been counted") && !text.contains("<svg"), "{text}");
    }

    #[test]
    fn the_running_block_is_shown_by_pod_and_a_replica_that_does_not_lead_says_so() {
        let pod = PodAttempts {
            name: "web-<new>".to_owned(),
            version: "canary".to_owned(),
            revision: "5d4f".to_owned(),
            attempts: 1234,
            failures: 17,
            p99_ms: Some(42.0),
            ..PodAttempts::default()
        };
        let version = VersionAttempts { attempts: 1234, failures: 17, ..VersionAttempts::default() };
        let found = Evidence { leader: true, canary: version, pods: vec![pod], ..Evidence::default() };
        let text = canary(&paused(), &found, false, None).into_string();
        for part in ["web-&lt;new&gt;", ">5d4f<", ">1,234<", ">17<", &latency(Some(42.0))] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("does not lead"), "{text}");
        let follower = Evidence { leader: false, pods: Vec::new(), ..found };
        let text = canary(&paused(), &follower, false, None).into_string();
        assert!(text.contains("does not lead") && !text.contains("Attempts by pod"), "{text}");
    }

    #[test]
    fn what_needs_a_person_comes_first() {
        let with = |name: &str, phase: &str| example(name, &json!({"phase": phase}));
        let mut all = [with("a", "Stable"), with("c", "Failed"), with("b", "Failed"), with("d", "Paused")];
        sort(&mut all);
        let names: Vec<&str> = all.iter().map(name).collect();
        assert_eq!(names, ["b", "c", "d", "a"]);
        let text = canaries(&all, None).into_string();
        assert!(text.contains("4 Canaries") && text.contains(">failed</span>"), "{text}");
        assert!(canaries(&[], Some("shop")).into_string().contains("no Canary in namespace shop"));
    }

    #[test]
    fn the_interval_narrows_with_attempts_and_holds_the_rate() {
        let of = |attempts, failures| {
            Interval::of(&VersionAttempts { attempts, failures, ..VersionAttempts::default() }).unwrap()
        };
        let (few, many) = (of(100, 1), of(10_000, 100));
        assert!(many.high - many.low < few.high - few.low);
        assert!(few.low < 0.01 && 0.01 < few.high && of(50, 0).low < 1e-9 && of(50, 0).high > 0.05);
        assert_eq!(Interval::of(&VersionAttempts::default()), None);
    }
}
