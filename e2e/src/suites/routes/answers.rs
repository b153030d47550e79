//! What clients get and applications see: redirects, rewrites, shares, matches, mirrors, CORS, timeouts.

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::{answer, backend, below, counts, head, http, meshed, reason, response_header, settled, weighted};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, service};

/// A namespace with these services of one pod each, and a pod `client`.
fn with_services<'a>(kube: &'a Kube, namespace: &str, services: &[&str]) -> Result<TestNamespace<'a>> {
    let field = meshed(kube, namespace)?;
    services.iter().try_for_each(|name| field.service(name, 1, &[]))?;
    field.client("client")?;
    Ok(field)
}

pub(super) fn redirected(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-redirect", &["web"])?;
    let ports =
        json!({"ports": [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "other", "port": 8080}]});
    field.apply(service("web", ports))?;
    let rule = |path: &str, redirect: Value| json!({"matches": below(path), "filters": [{"type": "RequestRedirect", "requestRedirect": redirect}]});
    let prefix = |to: &str| json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": to});
    field.apply(http(
        "web",
        "web",
        json!([
            rule("/host", json!({"hostname": "new.example"})),
            rule("/tls", json!({"scheme": "https", "statusCode": 301})),
            rule("/tls-port", json!({"scheme": "https", "port": 8443, "statusCode": 303})),
            rule("/port", json!({"port": 8443, "statusCode": 307})),
            rule("/port-80", json!({"port": 80, "statusCode": 308})),
            rule("/old", json!({"path": prefix("/new")})),
            rule("/root", json!({"path": prefix("/")})),
            rule("/full", json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/one"}})),
        ]),
    ))?;
    settled(&field, "httproute/web")?;
    for (url, status, location) in [
        ("http://web/host/a?b=c", "302", "http://new.example/host/a?b=c"),
        ("http://web:8080/host", "302", "http://new.example:8080/host"),
        ("http://web/tls", "301", "https://web/tls"),
        ("http://web:8080/tls", "301", "https://web/tls"),
        ("http://web/tls-port", "303", "https://web:8443/tls-port"),
        ("http://web/port", "307", "http://web:8443/port"),
        ("http://web:8080/port-80", "308", "http://web/port-80"),
        ("http://web/old/a", "302", "http://web/new/a"),
        ("http://web/old", "302", "http://web/new"),
        ("http://web/root/a", "302", "http://web/a"),
        ("http://web/root", "302", "http://web/"),
        ("http://web/full/a", "302", "http://web/one"),
    ] {
        let seen = head(&field, "client", &[url])?;
        ensure!(
            seen.status == status && seen.header("location") == location,
            "{url}: expected {status} {location}, found {} {}",
            seen.status,
            seen.header("location")
        );
    }
    Ok(())
}

pub(super) fn rewritten(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-rewrite", &["web"])?;
    let rule = |path: &str, rewrite: Value| {
        json!({"matches": below(path), "filters": [{"type": "URLRewrite", "urlRewrite": rewrite}],
            "backendRefs": [backend("web")]})
    };
    let prefix = |to: &str| json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": to}});
    field.apply(http(
        "web",
        "web",
        json!([
            rule("/v1", prefix("/")),
            rule("/v2", prefix("/two/")),
            rule("/v3/", prefix("/three")),
            rule("/full", json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/one"}})),
            rule("/host", json!({"hostname": "new.example"})),
        ]),
    ))?;
    settled(&field, "httproute/web")?;
    for (sent, seen, host) in [
        ("/v1/a?b=c&d", "/a?b=c&d", "web"),
        ("/v1", "/", "web"),
        ("/v1/", "/", "web"),
        ("/v2/a", "/two/a", "web"),
        ("/v3/a", "/three/a", "web"),
        ("/full/a/b?c", "/one?c", "web"),
        ("/host/a", "/host/a", "new.example"),
    ] {
        let answer = answer(&field, "client", &[&format!("http://web{sent}")])?;
        let (target, found) = (&answer["seen"]["target"], &answer["seen"]["headers"]["host"]);
        ensure!(
            target == seen && found == host,
            "{sent}: the application saw {target} of {found}, expected {seen} of {host}"
        );
    }
    Ok(())
}

pub(super) fn invalid_backends(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-invalid", &["web"])?;
    field.apply(service("empty", json!({})))?;
    field.apply(http(
        "web",
        "web",
        json!([
            {"matches": below("/part"), "backendRefs": [weighted("web", 3), weighted("missing", 1)]},
            {"matches": below("/all"), "backendRefs": [backend("missing")]},
            {"matches": below("/none")},
            {"matches": below("/empty"), "backendRefs": [backend("empty")]},
        ]),
    ))?;
    let route = settled(&field, "httproute/web")?;
    let resolved = reason(super::entries(&route)[0], "ResolvedRefs");
    ensure!(resolved == "False BackendNotFound", "ResolvedRefs is {resolved}");
    let seen = counts(&field, "client", "web", "/part", 400)?;
    let (good, bad) = (seen.get("200/web").copied(), seen.get("500/").copied());
    ensure!(
        good.is_some_and(|count| (296..=304).contains(&count)) && good.unwrap_or(0) + bad.unwrap_or(0) == 400,
        "a quarter of 400 requests has an invalid backend; the answers were {seen:?}"
    );
    for (path, status) in [("/all", "500"), ("/none", "500"), ("/empty", "503"), ("/elsewhere", "404")] {
        let seen = head(&field, "client", &[&format!("http://web{path}")])?;
        ensure!(seen.status == status, "{path}: expected {status}, found {seen:?}");
    }
    // A backend that appears is used.
    field.service("missing", 1, &[])?;
    kube.wait_for("the new backend to answer", 60, || {
        Ok(head(&field, "client", &["http://web/all"])?.status == "200")
    })
}

pub(super) fn matched(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-match", &["web", "other"])?;
    let to = |matches: Value| json!({"matches": matches, "backendRefs": [backend("other")]});
    field.apply(http(
        "web",
        "web",
        json!([
            to(json!([{"method": "DELETE"}])),
            to(json!([{"queryParams": [{"name": "to", "value": "other"}]}])),
            to(json!([{"path": {"type": "RegularExpression", "value": "/items/[0-9]+"}}])),
            to(json!([{"headers": [{"type": "RegularExpression", "name": "x-user", "value": "a.*"}]}])),
            {"backendRefs": [backend("web")]},
        ]),
    ))?;
    settled(&field, "httproute/web")?;
    for (arguments, expected) in [
        (&["http://web/"][..], "web"),
        (&["-X", "DELETE", "http://web/"], "other"),
        (&["http://web/?a=b&to=other"], "other"),
        (&["http://web/?to=others"], "web"),
        (&["http://web/items/12"], "other"),
        (&["http://web/items/12/a"], "web"),
        (&["-H", "X-User: anna", "http://web/"], "other"),
        (&["-H", "X-User: hanna", "http://web/"], "web"),
    ] {
        let answer = answer(&field, "client", arguments)?;
        ensure!(answer["service"] == expected, "{arguments:?} was answered by {}", answer["service"]);
    }
    Ok(())
}

pub(super) fn headers_of_backends(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-headers", &["web", "other"])?;
    let edits = json!([
        {"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": "x-set", "value": "other"}], "add": [{"name": "x-add", "value": "b"}], "remove": ["x-remove"]}},
        response_header("x-from", "other"),
    ]);
    field.apply(http(
        "web",
        "web",
        json!([
            {"matches": below("/other"), "backendRefs": [{"name": "other", "port": 80, "filters": edits}]},
            {"backendRefs": [backend("web")]},
        ]),
    ))?;
    settled(&field, "httproute/web")?;
    let sent = ["-H", "x-set: mine", "-H", "x-add: a", "-H", "x-remove: yes"];
    for (url, expected) in [("http://web/other", ["other", "a,b", ""]), ("http://web/", ["mine", "a", "yes"])]
    {
        let answer = answer(&field, "client", &[&sent[..], &[url]].concat())?;
        let header = |name: &str| answer["seen"]["headers"][name].as_str().unwrap_or("").replace(", ", ",");
        let seen = [header("x-set"), header("x-add"), header("x-remove")];
        ensure!(seen == expected, "{url}: the application saw {seen:?}, expected {expected:?}");
    }
    let from =
        |url: &str| Ok::<_, anyhow::Error>(head(&field, "client", &[url])?.header("x-from").to_owned());
    let (other, web) = (from("http://web/other")?, from("http://web/")?);
    ensure!(other == "other" && web.is_empty(), "x-from of other is {other:?}, of web {web:?}");
    Ok(())
}

pub(super) fn mirrored(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-mirror", &["web"])?;
    // A mirror that fails every request, which no client may notice.
    field.service("mirror", 1, &["--errors=100"])?;
    let mirror = |share: Value| {
        let mut mirror = json!({"backendRef": backend("mirror")});
        share.as_object().into_iter().flatten().for_each(|(name, value)| mirror[name] = value.clone());
        json!({"type": "RequestMirror", "requestMirror": mirror})
    };
    let rules = json!([
        {"matches": below("/half"), "filters": [mirror(json!({"percent": 50}))], "backendRefs": [backend("web")]},
        {"filters": [mirror(json!({}))], "backendRefs": [backend("web")]},
    ]);
    field.apply(http("web", "web", rules))?;
    settled(&field, "httproute/web")?;
    let copies = || field.received("mirror");
    for (path, expected) in [("/", 200..=200), ("/half", 60..=140)] {
        let before = copies()?;
        let mut got = 0;
        // A sidecar drops copies while 64 are under way, and a busy machine may be so far behind: more are sent when they
        // have come. How many of half the requests is not known; then two seconds pass without one.
        for sent in [50, 100, 150, 200] {
            let seen = counts(&field, "client", "web", path, 50)?;
            ensure!(seen.get("200/web") == Some(&50), "{path}: the answers were {seen:?}");
            let mut same = 0;
            let _ = kube.wait_for("the copies", 60, || {
                let now = copies()? - before;
                same = if now == got { same + 1 } else { 0 };
                got = now;
                Ok(got == sent || same >= 4)
            });
        }
        let waited = kube.wait_for("the copies", 60, || {
            got = copies()? - before;
            Ok(expected.contains(&got))
        });
        if waited.is_err() {
            let of = |reason: &str| -> Result<u64> {
                let reason = format!("reason=\"{reason}\"");
                field.metric("client", &["tulle_events_total{", "kind=\"copied_request\"", &reason])
            };
            let outcomes = ["Sent", "Failed", "SkippedBusy", "SkippedSlow", "SkippedNoEndpoint"];
            let all: Vec<String> = outcomes
                .iter()
                .map(|reason| Ok(format!("{reason} {}", of(reason)?)))
                .collect::<Result<_>>()?;
            bail!(
                "{path}: {got} copies of 200 requests, expected {expected:?}; copies of both paths: {all:?}"
            );
        }
    }
    Ok(())
}

pub(super) fn cors(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-cors", &["web"])?;
    let cors = json!({"allowOrigins": ["https://shop.example"], "allowMethods": ["GET", "PUT"],
        "allowHeaders": ["x-user"], "exposeHeaders": ["x-total"], "maxAge": 600});
    let rules = json!([{"filters": [{"type": "CORS", "cors": cors}], "backendRefs": [backend("web")]}]);
    field.apply(http("web", "web", rules))?;
    settled(&field, "httproute/web")?;
    let ask = |origin: &str, more: &[&str]| {
        let origin = format!("origin: {origin}");
        head(&field, "client", &[&["-H", &origin, "http://web/"], more].concat())
    };
    let preflight = ["-X", "OPTIONS", "-H", "access-control-request-method: PUT"];
    let allowed = ask("https://shop.example", &preflight)?;
    let allows = |name: &str| allowed.header(&format!("access-control-allow-{name}")).to_lowercase();
    ensure!(
        allowed.status.starts_with('2')
            && allows("origin") == "https://shop.example"
            && allows("methods").contains("put")
            && allows("headers").contains("x-user")
            && allowed.header("access-control-max-age") == "600",
        "the preflight request was answered {allowed:?}"
    );
    let actual = ask("https://shop.example", &[])?;
    ensure!(
        actual.header("access-control-allow-origin") == "https://shop.example"
            && actual.header("access-control-expose-headers").eq_ignore_ascii_case("x-total"),
        "the request was answered {actual:?}"
    );
    for answer in [ask("https://other.example", &preflight)?, ask("https://other.example", &[])?] {
        let origin = answer.header("access-control-allow-origin");
        ensure!(origin.is_empty(), "another origin was allowed: {answer:?}");
    }
    Ok(())
}

pub(super) fn timeouts(kube: &Kube) -> Result<()> {
    let field = with_services(kube, "t-r-timeout", &["web"])?;
    field.service("slow", 1, &["--delay=10000"])?;
    let rule = |path: &str, timeouts: Value| json!({"matches": below(path), "timeouts": timeouts, "backendRefs": [backend("slow")]});
    let rules = json!([
        rule("/request", json!({"request": "500ms"})),
        rule("/attempt", json!({"request": "20s", "backendRequest": "300ms"})),
        rule("/none", json!({"request": "0s"})),
    ]);
    field.apply(http("web", "web", rules))?;
    settled(&field, "httproute/web")?;
    let timed = |path: &str| -> Result<(String, f64)> {
        let script =
            format!("curl -s -m 60 -o /dev/null -w '%{{http_code}} %{{time_total}}' http://web{path}");
        let text = field.exec("client", &["/bin/sh", "-c", &script])?;
        let (status, seconds) = text.split_once(' ').unwrap_or(("", ""));
        Ok((status.to_owned(), seconds.parse()?))
    };
    for (path, status, seconds) in
        [("/request", "504", 0.5), ("/attempt", "504", 0.3), ("/none", "200", 10.0)]
    {
        let (found, took) = timed(path)?;
        ensure!(
            found == status && took >= seconds,
            "{path}: {found} after {took} s, expected {status} after {seconds} s"
        );
    }
    Ok(())
}
