//! Applications that meshes are known to break. The yardstick is the same pod without a sidecar: each of these
//! works there.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Test;
use super::namespace::{TestNamespace, borrows, host_pod, service};
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("whatever a client's first bytes look like, they reach the server at once and whole", greetings),
    ("commands of Redis' inline protocol work, also on a headless port declared redis", inline),
    ("a Redis Cluster forms where the source address is preserved", redis_cluster),
    ("a client that has ended its sending side gets its answer, also seconds later", |kube| {
        check(kube, "t-half", "half_close")
    }),
    ("docker exec and attach, SPDY exec and WebSockets are upgraded, with a request's body first", |kube| {
        check(kube, "t-upgrade", "upgrades")
    }),
    ("a forward proxy gets CONNECT and absolute form as they were sent", |kube| {
        check(kube, "t-forward", "forward_proxy")
    }),
    ("odd answers that a proxy must pass on arrive", |kube| check(kube, "t-odd", "odd_answers")),
    ("heads of 58 kB arrive; longer ones are answered 431", large_heads),
    ("150 gRPC streams begin on one channel", streams),
    ("a server that handles one connection at a time serves its clients and its probes", one_at_a_time),
    ("clients of an application that accepts nothing for nine seconds wait for it", |kube| {
        check(kube, "t-late", "late")
    }),
    ("a server that closes each connection without saying so costs no request", |kube| {
        check(kube, "t-closing", "closed_connections")
    }),
    ("a POST whose application resets its connection is carried out once, and a GET is answered", resets),
    (
        "a server that expects the PROXY protocol answers a gateway with a sidecar, and an opaque port carries no claim",
        preambles,
    ),
    ("HTTP/1 on a port declared h2c and HTTP/2 on one declared http work", disagreeing),
    ("a deny of /admin/** refuses every spelling of it and changes no other path", spellings),
    ("a rule by method or path counts no denial for requests that are allowed", no_false_denials),
];

const SERVER: &str = include_str!("../../peers/applications/server.py");
const CLIENT: &str = include_str!("../../peers/applications/client.py");

/// A namespace with the applications, meshed behind the Services `app` and `headless`, without a sidecar behind
/// `bare`, and with a client.
fn prepare<'a>(kube: &'a Kube, namespace: &str) -> Result<TestNamespace<'a>> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, namespace)?;
    let ports = json!([
        {"name": "echo", "port": 5701}, {"name": "web", "port": 80, "targetPort": 8080},
        {"name": "single", "port": 8081}, {"name": "closing", "port": 8082}, {"name": "late", "port": 8083},
    ]);
    field.apply(service("app", json!({"ports": ports})))?;
    field.apply(service("bare", json!({"ports": ports})))?;
    let headless =
        json!({"clusterIP": "None", "selector": {"app": "app"}, "ports": [{"name": "echo", "port": 5701}]});
    field.apply(service("headless", headless))?;
    for name in ["app", "bare"] {
        let mut pod = host_pod(name, "default", &["/usr/bin/python3", "-c", SERVER]);
        let container = &mut pod["spec"]["containers"][0];
        container["readinessProbe"] = json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
        if name == "bare" {
            pod["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
        }
        field.apply(pod)?;
    }
    field.client("client")?;
    field.ready("app")?;
    field.ready("bare")?;
    Ok(field)
}

/// Runs a check of the client against hosts of the namespace.
fn run(field: &TestNamespace<'_>, check: &str, hosts: &[&str]) -> Result<()> {
    let hosts: Vec<String> =
        hosts.iter().map(|host| format!("{host}.{}.svc.cluster.local", field.namespace)).collect();
    let mut command = vec!["/usr/bin/python3", "-c", CLIENT, check];
    command.extend(hosts.iter().map(String::as_str));
    let wrong: Vec<String> = serde_json::from_str(&field.exec("client", &command)?)?;
    ensure!(wrong.is_empty(), "{} went wrong: {}", wrong.len(), wrong.join("; "));
    Ok(())
}

fn check(kube: &Kube, namespace: &str, check: &str) -> Result<()> {
    let field = prepare(kube, namespace)?;
    run(&field, check, &["app", "bare"])
}

fn greetings(kube: &Kube) -> Result<()> {
    let field = prepare(kube, "t-greetings")?;
    // Twice: what the first round teaches of the port must not change the second.
    run(&field, "greetings", &["app", "headless", "bare", "app"])
}

fn inline(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-inline")?;
    let port = json!([{"name": "commands", "port": 6379}]);
    field.apply(service("redis", json!({"ports": port})))?;
    let declared = json!([{"name": "redis", "port": 6379, "appProtocol": "redis"}]);
    field.apply(service(
        "headless",
        json!({"clusterIP": "None", "selector": {"app": "redis"}, "ports": declared}),
    ))?;
    let server = ["/usr/bin/redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"];
    field.server_pod("redis", 6379, &server)?;
    field.client("client")?;
    let script = "import json, socket, sys
wrong = []
for host in sys.argv[1:]:
    for command, answer in [('SET hello world', '+OK'), ('GET hello', '$5'), ('KEYS *', '*1'), ('PING', '+PONG'),
                            ('PUT x', '-ERR'), ('DEL hello', ':1'), ('OPTIONS *', '-ERR'), ('GET /', '$-1'), ('QUIT', '+OK')]:
        try:
            with socket.create_connection((host, 6379), 5) as s:
                s.settimeout(5)
                s.sendall(command.encode() + b'\\r\\n')
                seen = s.recv(4096).decode('latin1')
                if not seen.startswith(answer): wrong.append(f'{command} to {host}: {seen[:60]!r}')
        except OSError as error:
            wrong.append(f'{command} to {host}: {type(error).__name__}')
print(json.dumps(wrong))";
    let hosts = ["redis.t-inline.svc.cluster.local", "headless.t-inline.svc.cluster.local"];
    let command = [&["/usr/bin/python3", "-c", script], &hosts[..]].concat();
    let wrong: Vec<String> = serde_json::from_str(&field.exec("client", &command)?)?;
    ensure!(wrong.is_empty(), "{} went wrong: {}", wrong.len(), wrong.join("; "));
    Ok(())
}

fn redis_cluster(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-cluster")?;
    let names = ["r0", "r1", "r2"];
    for name in names {
        let server = [
            "/usr/bin/redis-server",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--dir",
            "/data",
            "--cluster-enabled",
            "yes",
            "--cluster-config-file",
            "/data/nodes.conf",
        ];
        let mut pod = host_pod(name, "default", &server);
        pod["metadata"]["annotations"] = json!({"tulle.dev/source-address": "preserve"});
        pod["spec"]["containers"][0]["readinessProbe"] =
            json!({"tcpSocket": {"port": 6379}, "periodSeconds": 1});
        let said = field.apply(pod)?;
        ensure!(said.contains("NET_RAW"), "no admission warning names the capability: {said}");
    }
    let mut addresses = Vec::new();
    for name in names {
        field.ready(name)?;
        addresses.push(field.get(&format!("pod/{name}"), ".status.podIP")? + ":6379");
    }
    let mut create = vec!["/usr/bin/redis-cli", "--cluster", "create"];
    create.extend(addresses.iter().map(String::as_str));
    create.extend(["--cluster-replicas", "0", "--cluster-yes"]);
    field.exec("r0", &[&["/usr/bin/timeout", "60"], &create[..]].concat())?;
    let ask = |what: &str| field.exec("r0", &["/usr/bin/redis-cli", "cluster", what]);
    kube.wait_for("the cluster to be whole", 60, || Ok(ask("info")?.contains("cluster_state:ok")))?;
    let nodes = ask("nodes")?;
    for address in &addresses {
        ensure!(nodes.contains(address.as_str()), "{address} is missing among the nodes: {nodes}");
    }
    Ok(())
}

fn large_heads(kube: &Kube) -> Result<()> {
    let field = prepare(kube, "t-large-heads")?;
    run(&field, "large_heads", &["app", "bare"])?;
    let script = "curl -s -m 8 -o /dev/null -w '%{http_code}' -H \"X: $(head -c 90000 /dev/zero | tr '\\0' x)\" http://app.t-large-heads.svc.cluster.local/ || true";
    let status = field.exec("client", &["/bin/sh", "-c", script])?;
    ensure!(status == "431", "a head of 90 kB is answered {status}");
    Ok(())
}

fn streams(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-streams")?;
    field.apply(service("counter", json!({"ports": [{"port": 80, "targetPort": 50051}]})))?;
    let server = include_str!("../../peers/grpc_server.py");
    field.server_pod("counter", 50051, &["/usr/bin/python3", "-c", server, "50051"])?;
    field.client("client")?;
    let client = include_str!("../../peers/grpc_client.py");
    let target = "counter.t-streams.svc.cluster.local:80";
    let seen = field.exec("client", &["/usr/bin/python3", "-c", client, "streams", target, "150"])?;
    let seen: Value = serde_json::from_str(&seen)?;
    ensure!(seen["began"] == 150, "of 150 streams {} began", seen["began"]);
    Ok(())
}

fn one_at_a_time(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-single")?;
    field.apply(service("app", json!({"ports": [{"name": "web", "port": 8081}]})))?;
    let mut pod = host_pod("app", "default", &["/usr/bin/python3", "-c", SERVER]);
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": 8081}, "periodSeconds": 1, "timeoutSeconds": 1});
    field.apply(pod)?;
    field.ready("app")?;
    field.client("client")?;
    let unhealthy = || -> Result<u64> {
        let selector = "reason=Unhealthy,involvedObject.name=app";
        let events = kube.json(&["-n", "t-single", "get", "events", "--field-selector", selector])?;
        let events = events["items"].as_array().context("no list of events")?;
        Ok(events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum())
    };
    thread::sleep(Duration::from_secs(2));
    let before = unhealthy()?;
    run(&field, "one_at_a_time", &["app"])?;
    let failed = unhealthy()? - before;
    ensure!(failed == 0, "{failed} probes failed meanwhile");
    Ok(())
}

/// Sends GETs and POSTs with a connection for each. Arguments: host, a name for the requests, and their number. Prints by
/// method how often there was which status, and how many requests the application has seen how many times.
const REPEATED: &str = "import collections, http.client, json, sys
host, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
def ask(method, path):
    connection = http.client.HTTPConnection(host, timeout=8)
    try:
        connection.request(method, path, b'x' if method == 'POST' else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error: return type(error).__name__, b''
    finally: connection.close()
answered = {method: collections.Counter(ask(method, f'/{name}/{one}')[0] for one in range(number)) for method in ('GET', 'POST')}
seen = json.loads(ask('GET', '/seen')[1])
times = {method: collections.Counter(count for what, count in seen.items() if what.startswith(f'{method} /{name}/')) for method in answered}
print(json.dumps({'answered': answered, 'times': times}))";

fn resets(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-resets")?;
    field.apply(service("app", json!({})))?;
    let server = include_str!("../../peers/resetting_server.py");
    field.server_pod("app", 8080, &["/usr/bin/python3", "-c", server, "8080"])?;
    field.client("client")?;
    field.plain_client("plain")?;
    for pod in ["client", "plain"] {
        let command = ["/usr/bin/python3", "-c", REPEATED, "app.t-resets.svc.cluster.local", pod, "10"];
        let seen: Value = serde_json::from_str(&field.exec(pod, &command)?)?;
        // The answers to the GETs show that their first attempts were reset, and that a sidecar has seen it.
        ensure!(
            seen["answered"]["GET"] == json!({"200": 10}) && seen["times"]["GET"] == json!({"2": 10}),
            "{pod}: GETs whose first attempt is reset: {seen}"
        );
        ensure!(
            seen["answered"]["POST"]["200"].is_null() && seen["times"]["POST"] == json!({"1": 10}),
            "{pod}: POSTs that are read and reset: {seen}"
        );
    }
    Ok(())
}

/// A claim of another identity to a server that takes a line feed alone for the end of a line. Arguments: host, port.
const CLAIM: &str = "import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
    connection.settimeout(8)
    connection.sendall(b'GET / HTTP/1.1\\nHost: a\\nTulle_Client-Id: spiffe://x\\n\\n')
    answer = b''
    while piece := connection.recv(4096): answer += piece
print(answer.decode('latin1').rpartition('\\n')[2])";

fn preambles(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-preamble")?;
    field.apply(service("gateway", json!({})))?;
    let ports = json!([
        {"name": "preamble", "port": 81, "targetPort": 8081},
        {"name": "declared", "port": 82, "targetPort": 8082, "appProtocol": "tcp"},
        {"name": "undeclared", "port": 83, "targetPort": 8082},
    ]);
    field.apply(service("server", json!({"ports": ports})))?;
    let program = include_str!("../../peers/preamble.py");
    let host = "server.t-preamble.svc.cluster.local";
    field.server_pod("server", 8082, &["/usr/bin/python3", "-c", program, "server"])?;
    field.server_pod("gateway", 8080, &["/usr/bin/python3", "-c", program, "gateway", host])?;
    field.client("client")?;
    field.plain_client("plain")?;
    // The gateway passes on the name of its client, as it got it from its sidecar. It is not the client of the server's
    // pod, which must not take it for that.
    let passed = json!({"tulle-client-ix": "spiffe://cluster.local/ns/t-preamble/sa/client"});
    for way in ["v1", "v2", "declared"] {
        let url = format!("http://gateway.t-preamble.svc.cluster.local/{way}");
        let answer =
            field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", "-w", " %{http_code}", &url])?;
        let (body, status) = answer.rsplit_once(' ').context("curl printed no status")?;
        ensure!(status == "200", "{way}: the gateway answered {answer}");
        let seen: Value = serde_json::from_str(body).with_context(|| format!("{way}: answered {answer}"))?;
        ensure!(seen == passed, "{way}: the server saw {seen}");
    }
    for (pod, port) in [("client", "82"), ("client", "83"), ("plain", "82"), ("plain", "83")] {
        let printed = field.exec(pod, &["/usr/bin/python3", "-c", CLAIM, host, port])?;
        let seen: Value = serde_json::from_str(&printed)
            .with_context(|| format!("{pod} to port {port}: answered {printed:?}"))?;
        ensure!(
            seen == json!({"tulle_client-ix": "spiffe://x"}),
            "{pod} to port {port}: the server saw {seen}"
        );
    }
    Ok(())
}

fn disagreeing(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-disagree")?;
    let ports = |protocol: &str, target: u16| json!({"ports": [{"name": "web", "port": 80, "targetPort": target, "appProtocol": protocol}], "selector": {"app": "app"}});
    for (name, protocol, target) in
        [("h2c", "kubernetes.io/h2c", 8080), ("grpc", "grpc", 8080), ("http", "http", 50051)]
    {
        let mut spec = ports(protocol, target);
        if name == "http" {
            spec["selector"] = json!({"app": "counter"});
        }
        field.apply(service(name, spec))?;
    }
    field.server_pod("app", 8080, &["/usr/bin/python3", "-c", SERVER])?;
    let server = include_str!("../../peers/grpc_server.py");
    field.server_pod("counter", 50051, &["/usr/bin/python3", "-c", server, "50051"])?;
    field.client("client")?;
    for name in ["h2c", "grpc"] {
        let status = field.status("client", &format!("http://{name}.t-disagree.svc.cluster.local/"))?;
        ensure!(status == "200", "HTTP/1 on a port declared {name} is answered {status}");
    }
    let client = include_str!("../../peers/grpc_client.py");
    let target = "http.t-disagree.svc.cluster.local:80";
    let seen = field.exec("client", &["/usr/bin/python3", "-c", client, "once", target])?;
    ensure!(seen.contains("NOT_FOUND"), "gRPC on a port declared http: {seen}");
    Ok(())
}

/// Denies a path, and waits until the policy is in force.
fn deny(field: &TestNamespace<'_>, to: &Value) -> Result<()> {
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "deny"},
        "spec": {"target": {"kind": "Workload", "selector": {"matchLabels": {"app": "app"}}},
                 "access": {"deny": [{"to": [to]}]}}}),
    )?;
    let path = ".status.conditions[?(@.type==\"Ready\")].status";
    field.kube.wait_for("the policy to be in force", 60, || Ok(field.get("meshpolicy/deny", path)? == "True"))
}

fn spellings(kube: &Kube) -> Result<()> {
    let field = prepare(kube, "t-spellings")?;
    deny(&field, &json!({"paths": ["/admin/**", "/admin"]}))?;
    let script = "
for p in '/api/v4/projects/group%2Fproject?x=1' '/bucket/a//b.txt' '/files/%E2%82%AC.txt' '/docs/a;v=1/b' '/a%20b' '/v1/./x' '/administrator' '/x?y=/admin/z'; do
  got=$(curl -s -m 8 --path-as-is \"http://HOST$p\"); [ \"$got\" = \"$p\" ] || echo \"$p arrived as $got\"
done
for p in /admin /admin/ /admin/x //admin/x /%61dmin/x /x/../admin/y /./admin/y '/admin;a=b/x' /admin%2Fx /x%2F..%2Fadmin/y /%2561dmin/x '/admin%3Bx/y' /%2e/admin/x; do
  got=$(curl -s -m 8 -o /dev/null -w '%{http_code}' --path-as-is \"http://HOST$p\"); [ \"$got\" = 403 ] || echo \"$p was answered $got\"
done"
        .replace("HOST", "app.t-spellings.svc.cluster.local");
    for pod in ["client", "plain"] {
        if pod == "plain" {
            field.plain_client(pod)?;
        }
        let said = field.exec(pod, &["/bin/bash", "-c", &script])?;
        ensure!(said.is_empty(), "{pod}: {}", said.trim().replace('\n', "; "));
    }
    Ok(())
}

fn no_false_denials(kube: &Kube) -> Result<()> {
    let field = prepare(kube, "t-denials")?;
    deny(&field, &json!({"methods": ["DELETE"], "paths": ["/admin/**"]}))?;
    let denials = || -> Result<String> {
        let metrics =
            kube.run(&["get", "--raw", "/api/v1/namespaces/t-denials/pods/app:26152/proxy/metrics"])?;
        Ok(metrics.lines().filter(|line| line.contains("policy_denied")).collect())
    };
    let url = "http://app.t-denials.svc.cluster.local/";
    field.plain_client("plain")?;
    for _ in 0..15 {
        ensure!(field.status("client", url)? == "200", "a meshed client was refused");
        ensure!(field.status("plain", url)? == "200", "a plain client was refused");
    }
    // A client that speaks late is not judged before it speaks either.
    let script = "import socket, sys, time
with socket.create_connection((sys.argv[1], 80), 5) as s:
    time.sleep(0.3)
    s.sendall(b'GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n')
    print(s.recv(64).decode())";
    for pod in ["client", "plain"] {
        let host = "app.t-denials.svc.cluster.local";
        let seen = field.exec(pod, &["/usr/bin/python3", "-c", script, host])?;
        ensure!(seen.contains(" 200 "), "a client that speaks late got {seen:?}");
    }
    let denied = denials()?;
    ensure!(denied.is_empty(), "allowed requests were counted as denied: {denied}");
    let status = field.exec(
        "client",
        &[
            "/usr/bin/curl",
            "-s",
            "-m",
            "8",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-X",
            "delete",
            &format!("{url}admin/x"),
        ],
    )?;
    ensure!(status == "403", "`delete` passed a deny of DELETE with {status}");
    ensure!(!denials()?.is_empty(), "a denial was not counted");
    Ok(())
}
