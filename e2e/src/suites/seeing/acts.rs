//! What the page changes: a Canary, with `--allow-actions`, for users who may change it.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::page::{Answer, Page};
use super::rollout::{deploy, flows, phase, rests};
use super::{Scratch, rights, says};
use crate::cli::exit;
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::TestNamespace;

const NAMESPACE: &str = "t-see-acts";
const CANARY: &str = "/canary/t-see-acts/web";
const PAUSE: &str = "/canary/t-see-acts/web/pause";
/// The binding in Tulle's namespace, which is not removed with the test's own.
const BINDING: &str = "t-see-acts-looks";
/// What a browser would have to send to get a form that is not offered.
const FORGED: [&str; 4] = ["-H", "tulle-may: canary-actions", "-H", "tulle-form-token: forged"];
const NOTHING: &[&str] = &[];

pub(super) fn on_canaries(kube: &Kube) -> Result<()> {
    if !host::is_installed("curl") {
        bail!(Skip("this machine has no curl"));
    }
    let field = TestNamespace::meshed(kube, NAMESPACE)?;
    rests(&field, 20)?;
    at_rest(&field)?;
    deploy(&field, "v2")?;
    flows(&field, "20%")?;
    read_only(&field)?;
    let outcome = without_right(&field);
    let gone = ["-n", "tulle-system", "delete", "rolebinding", BINDING, "--ignore-not-found"];
    outcome.and(kube.run(&gone).map(drop))?;
    with_right(&field)
}

/// A page with what somebody needs to send forms to it.
struct Session<'a> {
    page: Page<'a>,
    cookie: String,
    origin: String,
}

impl<'a> Session<'a> {
    fn open(kube: &'a Kube, arguments: &[&str], options: &[&str]) -> Result<Self> {
        let page = Page::open_with(kube, &[arguments, &["-n", NAMESPACE]].concat(), options)?;
        let (cookie, origin) = (page.enter()?, page.origin());
        Ok(Self { page, cookie, origin })
    }

    fn get(&self, path: &str, more: &[&str]) -> Result<Answer> {
        self.page.ask(path, &[&["-b", self.cookie.as_str()], more].concat())
    }

    fn post(&self, path: &str, origin: &str, form: &str) -> Result<Answer> {
        // The command waits until the operator has taken the action.
        let cookie = self.cookie.as_str();
        self.page.ask(path, &["-m", "28", "-b", cookie, "-H", origin, "-d", form])
    }
}

/// Without a rollout, the reason stands where the actions would.
fn at_rest(field: &TestNamespace<'_>) -> Result<()> {
    let session = Session::open(field.kube, &[], &["--allow-actions"])?;
    field.kube.wait_for("the page to know that no rollout is in progress", 30, || {
        Ok(says(&session.get(CANARY, &[])?.body, &["no rollout is in progress"]).is_ok())
    })?;
    let asked = session.get(PAUSE, &[])?;
    ensure!(asked.status == "200" && !asked.body.contains("<form"), "{asked:?}");
    says(&asked.body, &["This would do nothing", "no rollout is in progress"])
}

/// Without the option there is no button, and no form is taken.
fn read_only(field: &TestNamespace<'_>) -> Result<()> {
    let session = Session::open(field.kube, &[], &[])?;
    field.kube.wait_for("the page to show the rollout", 30, || {
        Ok(session.get(CANARY, &[])?.body.contains("tulle canary pause web"))
    })?;
    for more in [NOTHING, &FORGED] {
        let shown = session.get(CANARY, more)?;
        ensure!(shown.status == "200", "{shown:?}");
        ensure!(!shown.body.contains(PAUSE), "it leads to an action: {}", shown.body);
        let asked = session.get(PAUSE, more)?;
        ensure!(asked.status == "403" && !asked.body.contains("<form"), "{asked:?}");
    }
    for token in ["", "token=forged&revision="] {
        let refused = session.post(PAUSE, &session.origin, token)?;
        ensure!(refused.status == "405", "{refused:?}");
        says(&refused.body, &["--allow-actions"])?;
    }
    unchanged(field, "Progressing")
}

/// Somebody who may look and not change gets no button, with the option too.
fn without_right(field: &TestNamespace<'_>) -> Result<()> {
    let kube = field.kube;
    let scratch = Scratch::new("acts")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "looker"}}))?;
    let config = scratch.file("looker.yaml", &rights::kubeconfig(kube, field)?.to_string())?;
    rights::bind(kube, "tulle-system", BINDING, ("Role", "tulle-portforward"), field)?;
    rights::bind(kube, NAMESPACE, "looks", ("ClusterRole", "tulle-namespace-viewer"), field)?;
    kube.wait_for("the right to look to take effect", 60, || {
        Ok(kube.tulle_ended(&["--kubeconfig", &config, "-n", NAMESPACE, "stat"])?.code == exit::FINE)
    })?;
    let session = Session::open(kube, &["--kubeconfig", &config], &["--allow-actions"])?;
    for more in [NOTHING, &FORGED] {
        let shown = session.get(CANARY, more)?;
        ensure!(shown.status == "200" && !shown.body.contains(PAUSE), "it offers an action: {shown:?}");
        let asked = session.get(PAUSE, more)?;
        ensure!(asked.status == "403" && !asked.body.contains("<form"), "{asked:?}");
    }
    let refused = session.post(PAUSE, &session.origin, "token=forged&revision=")?;
    ensure!(refused.status == "403", "{refused:?}");
    unchanged(field, "Progressing")
}

/// With the right and the option, a confirmed action is done, once, and only from a form of the page.
fn with_right(field: &TestNamespace<'_>) -> Result<()> {
    let session = Session::open(field.kube, &[], &["--allow-actions"])?;
    field.kube.wait_for("the page to offer a pause", 30, || {
        Ok(session.get(CANARY, &[])?.body.contains(&format!("href=\"{PAUSE}\"")))
    })?;
    let asked = session.get(PAUSE, &FORGED)?;
    ensure!(asked.status == "200", "{asked:?}");
    says(&asked.headers, &["referrer-policy: same-origin", "form-action 'self'", "default-src 'none'"])?;
    let (token, revision) = (hidden(&asked.body, "token")?, hidden(&asked.body, "revision")?);
    let seen = hidden(&asked.body, "seen")?;
    ensure!(token != "forged", "a browser has chosen the token");
    let rolled_out = field.get("canary/web", ".status.canaryRevision")?;
    ensure!(revision == rolled_out, "the form is about {revision}, not {rolled_out}");
    let same = format!("tulle canary pause web -n {NAMESPACE} --revision {revision}");
    says(&asked.body, &[&revision, "20 %", &same])?;

    let read = format!("revision={revision}&seen={seen}");
    let (form, wrong) = (format!("token={token}&{read}"), format!("token=0{token}&{read}"));
    let placeless = format!("token={token}&revision={revision}");
    let own = session.origin.as_str();
    for (origin, form) in [
        ("origin: http://127.0.0.1:1", form.as_str()),
        ("origin: null", form.as_str()),
        (own, read.as_str()),
        (own, placeless.as_str()),
        (own, wrong.as_str()),
    ] {
        let refused = session.post(PAUSE, origin, form)?;
        ensure!(refused.status == "403", "{origin} {form}: {refused:?}");
    }
    let refused = session.page.ask(PAUSE, &["-H", own, "-d", form.as_str()])?;
    ensure!(refused.status == "403", "without the key: {refused:?}");
    let other = session.post(PAUSE, own, &format!("token={token}&revision=other&seen={seen}"))?;
    ensure!(other.status == "409", "{other:?}");
    says(&other.body, &["not other", CANARY])?;
    unchanged(field, "Progressing")?;

    let done = session.post(PAUSE, own, &form)?;
    ensure!(done.status == "303", "{done:?}");
    ensure!(done.headers.lines().any(|line| line == format!("location: {CANARY}")), "{done:?}");
    ensure!(phase(field)? == "Paused", "the answer came before the pause: {}", phase(field)?);
    let again = session.post(PAUSE, own, &form)?;
    ensure!(again.status == "409", "{again:?}");
    says(&again.body, &["is Paused", CANARY])?;
    field.kube.wait_for("the page to offer to resume", 30, || {
        let shown = session.get(CANARY, &[])?.body;
        Ok(shown.contains(&format!("href=\"{CANARY}/resume\"")) && !shown.contains(PAUSE))
    })?;
    out_of_date(field, &session)
}

/// A form that was read before an abort does not promote the revision that failed since.
fn out_of_date(field: &TestNamespace<'_>, session: &Session<'_>) -> Result<()> {
    let form = |action: &str| -> Result<(String, String)> {
        let path = format!("{CANARY}/{action}");
        let asked = session.get(&path, &[])?.body;
        let [token, revision, seen] = ["token", "revision", "seen"].map(|name| hidden(&asked, name));
        Ok((path, format!("token={}&revision={}&seen={}", token?, revision?, seen?)))
    };
    let (promote, old) = form("promote")?;
    let (abort, now) = form("abort")?;
    let done = session.post(&abort, &session.origin, &now)?;
    ensure!(done.status == "303" && phase(field)? == "Failed", "{done:?}");
    let refused = session.post(&promote, &session.origin, &old)?;
    ensure!(refused.status == "409", "{refused:?}");
    says(&refused.body, &["is Failed", "by now", CANARY])?;
    ensure!(phase(field)? == "Failed", "the revision that failed was promoted: {}", phase(field)?);
    let action = field.get("canary/web", ".metadata.annotations.tulle\\.dev/action")?;
    ensure!(action.starts_with("abort:"), "another action was requested: {action}");
    Ok(())
}

/// No action was requested.
fn unchanged(field: &TestNamespace<'_>, expected: &str) -> Result<()> {
    let action = field.get("canary/web", ".metadata.annotations.tulle\\.dev/action")?;
    ensure!(action.is_empty(), "an action was requested: {action}");
    ensure!(phase(field)? == expected, "the Canary is {}", phase(field)?);
    Ok(())
}

/// The value of a hidden field.
fn hidden(body: &str, name: &str) -> Result<String> {
    let before = format!("<input type=\"hidden\" name=\"{name}\" value=\"");
    let value = body.split_once(&before).and_then(|(_, rest)| rest.split('"').next());
    Ok(value.with_context(|| format!("no field {name} in:\n{body}"))?.to_owned())
}
