//! Connections between pods, to every kind of address, with real servers of several protocols.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::namespace::{TestNamespace, borrows, deployment, service};
use super::{Skip, Test};
use crate::host;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    (
        "meshed to meshed is always mTLS: by Service, headless Service and the pod's own address",
        meshed_to_meshed,
    ),
    (
        "a meshed client reaches a plain server, the Kubernetes API, and itself through its Service",
        meshed_to_others,
    ),
    ("IPv6 is redirected, encrypted and authorised like IPv4", ipv6),
    ("UDP and loopback are left alone", udp_and_loopback),
    ("meshed clients reach ports that a sidecar does not intercept, in plain text", unseen_ports),
    (
        "a Service without endpoints answers 503 at once; an unused address fails as fast as without a mesh",
        nobody,
    ),
    ("MariaDB, a server that speaks first, greets its clients before a timer ends", mariadb),
    ("PostgreSQL and Redis work through the mesh", postgres_and_redis),
    (
        "gRPC works through the mesh: unary calls, streams in both directions, errors, the caller's identity",
        grpc,
    ),
    ("WebSockets work through the mesh", websocket),
    ("a large upload and a large download arrive whole", bulk),
    ("a network that is cut for ten seconds costs no open session", network_cut),
    ("garbage on any port closes the connection and harms nobody else", garbage),
];

fn meshed_to_meshed(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-talk")?;
    field.service("web", 1, &[])?;
    let mut headless = service("headless", json!({"clusterIP": "None", "selector": {"app": "web"}}));
    headless["spec"]["ports"][0]["port"] = json!(8080);
    field.apply(headless)?;
    field.client("client")?;
    let address =
        field.kubectl(&["get", "pod", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    for url in [
        "http://web.t-talk.svc.cluster.local/".to_owned(),
        "http://headless.t-talk.svc.cluster.local:8080/".to_owned(),
        format!("http://{address}:8080/"),
    ] {
        let answer = field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", &url])?;
        ensure!(
            answer.contains("spiffe://cluster.local/ns/t-talk/sa/client"),
            "{url}: the server saw {answer}"
        );
    }
    // A sidecar's configuration contains only what its pod uses.
    field.apply(service("unused", json!({"selector": {"app": "web"}})))?;
    let config = kube.run(&["get", "--raw", "/api/v1/namespaces/t-talk/pods/client:26152/proxy/config"])?;
    ensure!(
        config.contains("t-talk/web:80") && !config.contains("t-talk/unused"),
        "expected t-talk/web:80, and not t-talk/unused, in the sidecar's configuration: {config}"
    );
    Ok(())
}

fn udp_and_loopback(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-udp")?;
    let serve = "import socket, threading, http.server
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(('0.0.0.0', 9999))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(self.headers.get('tulle-client-id')).encode())
threading.Thread(target=http.server.HTTPServer(('127.0.0.1', 9000), Handler).serve_forever, daemon=True).start()
while True:
    data, who = udp.recvfrom(2000); udp.sendto(data + b' from ' + who[0].encode(), who)";
    field.host_pod("server", "default", &["/usr/bin/python3", "-c", serve])?;
    field.client("client")?;
    let (server, client) =
        (field.get("pod/server", ".status.podIP")?, field.get("pod/client", ".status.podIP")?);
    let ask = format!(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.sendto(b'ping', ('{server}', 9999)); print(s.recv(2000).decode())"
    );
    kube.wait_for("an echo over UDP, from the client's own address", 60, || {
        Ok(field.exec("client", &["/usr/bin/python3", "-c", &ask])?.trim() == format!("ping from {client}"))
    })?;
    let local = field.exec("server", &["/usr/bin/curl", "-s", "-m", "5", "http://127.0.0.1:9000/"])?;
    ensure!(local == "None", "a request over loopback went through the sidecar: {local}");
    Ok(())
}

fn unseen_ports(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-unseen")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web"}}))?;
    let mut web = deployment("web", 1, &[]);
    web["spec"]["template"]["metadata"]["annotations"] = json!({"tulle.dev/skip-inbound-ports": "8080"});
    field.apply(service("web", json!({})))?;
    field.apply(web)?;
    kube.rolled_out("t-unseen", "deployment/web", 120)?;
    field.client("client")?;
    let ask = |url: &str| field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", url]);
    let answer = ask("http://web.t-unseen.svc.cluster.local/")?;
    ensure!(
        answer.contains("\"client\":null"),
        "the excluded port was reached through the sidecar: {answer}"
    );
    let pod = field.kubectl(&["get", "pod", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    let metrics = ask(&format!("http://{pod}:26152/metrics"))?;
    ensure!(metrics.contains("tulle_operator_connected 1"), "a meshed Prometheus would read {metrics:?}");
    Ok(())
}

fn ipv6(kube: &Kube) -> Result<()> {
    let addresses = kube.run(&["get", "nodes", "-o", "jsonpath={.items[*].status.addresses[*].address}"])?;
    if !addresses.contains(':') {
        bail!(Skip("the nodes of this cluster have no IPv6 address"));
    }
    let field = TestNamespace::meshed(kube, "t-six")?;
    field.service("web", 1, &[])?;
    let six = json!({"selector": {"app": "web"}, "ipFamilies": ["IPv6"], "ipFamilyPolicy": "SingleStack"});
    field.apply(service("six", six))?;
    field.client("client")?;
    field.plain_client("plain")?;
    let all = "jsonpath={.items[0].status.podIPs[*].ip}";
    let all = field.kubectl(&["get", "pod", "-l", "app=web", "-o", all])?;
    let own = all.split(' ').find(|address| address.contains(':')).context("no IPv6 address")?;
    let (by_pod, by_service) = (format!("http://[{own}]:8080/"), "http://six.t-six.svc.cluster.local/");
    for url in [by_pod.as_str(), by_service] {
        let answer = field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", url])?;
        ensure!(
            answer.contains("spiffe://cluster.local/ns/t-six/sa/client"),
            "{url}: the server saw {answer}"
        );
    }
    ensure!(field.status("plain", &by_pod)? == "200", "no plain text under Permissive");
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "strict"},
        "spec": {"target": {"kind": "Service", "name": "web"}, "mtls": "Strict"}}),
    )?;
    kube.wait_for("Strict to be enforced", 60, || {
        Ok(field.get("meshpolicy/strict", ".status.enforced")? == "1/1")
    })?;
    ensure!(field.status("plain", &by_pod)? == "000", "plain text was accepted over IPv6 under Strict");
    ensure!(field.status("client", by_service)? == "200", "mTLS was not accepted over IPv6 under Strict");
    Ok(())
}

fn meshed_to_others(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let (meshed, plain) = (TestNamespace::meshed(kube, "t-out")?, TestNamespace::plain(kube, "t-server")?);
    plain.service("web", 1, &[])?;
    meshed.client("client")?;
    ensure!(
        meshed.status("client", "http://web.t-server.svc.cluster.local/")? == "200",
        "no answer from a plain server"
    );
    let api = meshed.exec(
        "client",
        &["/usr/bin/curl", "-sk", "-m", "8", "https://kubernetes.default.svc.cluster.local/version"],
    )?;
    ensure!(api.contains("gitVersion"), "the Kubernetes API answered {api}");
    // A pod that calls itself through its Service: the sidecar hands the connection over locally.
    meshed.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "self"}}))?;
    meshed.apply(service("self", json!({"ports": [{"port": 80, "targetPort": 8080}]})))?;
    meshed.host_pod(
        "self",
        "self",
        &["/usr/bin/python3", "-m", "http.server", "8080", "--directory", "/etc/apt"],
    )?;
    ensure!(
        meshed.status("self", "http://self.t-out.svc.cluster.local/")? == "200",
        "a pod cannot reach itself"
    );
    Ok(())
}

fn nobody(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-nobody")?;
    field.apply(service("empty", json!({})))?;
    field.client("client")?;
    field.plain_client("plain")?;
    let Fastest { status, seconds } = fastest(&field, "client", "http://empty.t-nobody.svc.cluster.local/")?;
    ensure!(status == "503", "a Service without endpoints answered {status}");
    ensure!(seconds < TIMER, "a Service without endpoints took {seconds} s to answer");
    let without = fastest(&field, "plain", "http://10.99.99.99/")?;
    ensure!(without.status == "000", "without a mesh, an unused address answered {}", without.status);
    let Fastest { status, seconds } = fastest(&field, "client", "http://10.99.99.99/")?;
    ensure!(status == "000", "an unused address answered {status}");
    let without = without.seconds;
    ensure!(seconds < without + TIMER, "the failure took {seconds} s, and {without} s without a mesh");
    Ok(())
}

/// In seconds: shorter than any timer by which a proxy decides that a peer stays silent, and longer than the
/// fastest or the median of several connections takes on a busy machine.
const TIMER: f64 = 0.5;

/// The fastest of several answers. A timer would delay each of them; a busy machine delays only some.
struct Fastest {
    /// The HTTP status of all answers, `000` for no answer.
    status: String,
    seconds: f64,
}

fn fastest(field: &TestNamespace<'_>, pod: &str, url: &str) -> Result<Fastest> {
    // curl's own exit code says only that there was no answer.
    let script = format!(
        "for i in 1 2 3 4 5; do curl -s -m 8 -o /dev/null -w '%{{http_code}} %{{time_total}}\\n' {url}; done; true"
    );
    let answers = field.exec(pod, &["/bin/sh", "-c", &script])?;
    let mut best: Option<Fastest> = None;
    for line in answers.lines() {
        let (status, seconds) = line.split_once(' ').with_context(|| format!("curl printed {line:?}"))?;
        let seconds: f64 = seconds.parse().with_context(|| format!("curl printed {line:?}"))?;
        match &mut best {
            None => best = Some(Fastest { status: status.to_owned(), seconds }),
            Some(best) => {
                ensure!(best.status == status, "{url} was answered with {} and {status}", best.status);
                best.seconds = best.seconds.min(seconds);
            }
        }
    }
    best.context("curl printed nothing")
}

fn mariadb(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-mariadb")?;
    let script = "mkdir -p /data/db /run/mysqld && mariadb-install-db --no-defaults --user=root --datadir=/data/db --auth-root-authentication-method=normal >/dev/null && exec mariadbd --no-defaults --user=root --datadir=/data/db --skip-grant-tables --skip-name-resolve --skip-networking=0 --bind-address=0.0.0.0 --port=3306 --socket=/run/mysqld/s";
    field.apply(service("db", json!({"ports": [{"port": 3306, "targetPort": 3306}]})))?;
    field.server_pod("db", 3306, &["/bin/bash", "-c", script])?;
    field.client("client")?;
    let query = [
        "/usr/bin/mariadb",
        "--no-defaults",
        "-h",
        "db.t-mariadb.svc.cluster.local",
        "--skip-ssl",
        "-N",
        "-e",
        "select 40+2",
    ];
    ensure!(field.exec("client", &query)?.trim() == "42", "MariaDB gave a wrong answer");
    let host = "db.t-mariadb.svc.cluster.local";
    let median = field.exec("client", &["/usr/bin/python3", "-c", GREETED, host])?;
    let seconds: f64 = median.trim().parse().with_context(|| format!("the client printed {median:?}"))?;
    ensure!(seconds < TIMER, "the greeting takes {seconds} s: a proxy waits for a timer");
    // The same once the sidecar knows the port.
    ensure!(field.exec("client", &query)?.trim() == "42", "MariaDB gave a wrong answer");
    Ok(())
}

/// Prints the median time in seconds until the server's first byte, for clients that send nothing.
const GREETED: &str = "import socket, statistics, sys, time
def greeted():
    start = time.monotonic()
    with socket.create_connection((sys.argv[1], 3306), timeout=10) as connection:
        assert connection.recv(1), 'no greeting'
    return time.monotonic() - start
print(statistics.median(greeted() for _ in range(7)))";

fn postgres_and_redis(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-databases")?;
    let versions = std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
    let versions = versions.flatten().map(|version| version.path().join("bin"));
    let bin =
        versions.filter(|bin| bin.join("postgres").exists()).max().context("PostgreSQL is not installed")?;
    let bin = bin.display();
    let script = format!(
        "chown nobody /data /run && exec setpriv --reuid=65534 --regid=65534 --clear-groups /bin/bash -c '{bin}/initdb -D /data/db -A trust -U postgres >/dev/null && echo host all all all trust >> /data/db/pg_hba.conf && exec {bin}/postgres -D /data/db -h 0.0.0.0 -k /tmp'"
    );
    field.apply(service("postgres", json!({"ports": [{"port": 5432, "targetPort": 5432}]})))?;
    field.apply(service("redis", json!({"ports": [{"port": 6379, "targetPort": 6379}]})))?;
    field.server_pod("postgres", 5432, &["/bin/bash", "-c", &script])?;
    field.server_pod(
        "redis",
        6379,
        &["/usr/bin/redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"],
    )?;
    field.client("client")?;
    let psql = [
        "/usr/bin/psql",
        "-h",
        "postgres.t-databases.svc.cluster.local",
        "-U",
        "postgres",
        "-Atc",
        "select 40+2",
    ];
    let answer = field.exec("client", &psql)?;
    ensure!(answer.trim() == "42", "PostgreSQL: {answer}");
    let redis = ["/usr/bin/redis-cli", "-h", "redis.t-databases.svc.cluster.local", "ping"];
    let answer = field.exec("client", &redis)?;
    ensure!(answer.trim() == "PONG", "Redis: {answer}");
    Ok(())
}

fn grpc(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-grpc")?;
    let ports = json!({"ports": [{"port": 80, "targetPort": 50051}]});
    field.apply(service("counter", ports))?;
    let server = include_str!("../../peers/grpc_server.py");
    field.server_pod("counter", 50051, &["/usr/bin/python3", "-c", server, "50051"])?;
    let client = include_str!("../../peers/grpc_client.py");
    let expected = json!({
        "caller": "spiffe://cluster.local/ns/t-grpc/sa/client", "counted": [0, 1, 2, 3, 4], "echoed": [1, 100_000, 1],
        "missing": "NOT_FOUND: there is no such thing",
    });
    sees(&field, &[client, "once", "counter.t-grpc.svc.cluster.local:80"], &expected)
}

fn websocket(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-websocket")?;
    field.apply(service("socket", json!({})))?;
    let server = include_str!("../../peers/websocket_server.py");
    field.server_pod("socket", 8080, &["/usr/bin/python3", "-c", server, "8080"])?;
    let client = include_str!("../../peers/websocket_client.py");
    let expected = json!({
        "caller": "spiffe://cluster.local/ns/t-websocket/sa/client", "counted": ["0", "1", "2"], "large": true,
        "last": "last", "closed": 1000,
    });
    sees(&field, &[client, "ws://socket.t-websocket.svc.cluster.local/"], &expected)
}

/// Runs a client written in Python, which prints as JSON what it has seen.
fn sees(field: &TestNamespace<'_>, client: &[&str], expected: &Value) -> Result<()> {
    field.client("client")?;
    let command = [&["/usr/bin/python3", "-c"], client].concat();
    let seen: Value = serde_json::from_str(&field.exec("client", &command)?)?;
    ensure!(seen == *expected, "the client saw {seen}");
    Ok(())
}

fn bulk(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-bulk")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    let script = "head -c 30000000 /dev/zero > /tmp/b && curl -s -m 30 --data-binary @/tmp/b http://web.t-bulk.svc.cluster.local/";
    let answer = field.exec("client", &["/bin/sh", "-c", script])?;
    ensure!(answer.contains("\"bytes\":30000000"), "the upload was answered {answer}");
    field.apply(service("files", json!({"ports": [{"port": 80, "targetPort": 8080}]})))?;
    let serve = "head -c 30000000 /dev/urandom > /data/b && cd /data && exec python3 -m http.server 8080";
    field.server_pod("files", 8080, &["/bin/sh", "-c", serve])?;
    let sums = "curl -s -m 30 http://files.t-bulk.svc.cluster.local/b | md5sum";
    let sent = field.exec("files", &["/bin/sh", "-c", "md5sum < /data/b"])?;
    let arrived = field.exec("client", &["/bin/sh", "-c", sums])?;
    ensure!(arrived == sent, "the download: {sent} was sent, {arrived} arrived");
    Ok(())
}

/// Sends back what it gets, on as many connections as come.
const ECHO: &str = "import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1024): self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(('', 8080), Echo).serve_forever()";

/// Three sessions that are used once, and once more when a file says so; prints what became of each.
const SESSIONS: &str = "import os, socket, time
def ask(session):
    session.sendall(b'hello')
    return session.recv(5).decode()
sessions = [socket.create_connection(('echo', 7000), timeout=40) for _ in range(3)]
for session in sessions: ask(session)
open('/tmp/open', 'w').close()
until = time.time() + 60
while not os.path.exists('/tmp/go') and time.time() < until: time.sleep(0.1)
for session in sessions:
    try: print(ask(session))
    except OSError as error: print(error)";

fn network_cut(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-cut")?;
    borrows(kube)?;
    field.apply(service("echo", json!({"ports": [{"port": 7000, "targetPort": 8080}]})))?;
    field.server_pod("echo", 8080, &["/usr/bin/python3", "-c", ECHO])?;
    field.client("client")?;
    let address = field.get("pod/echo", ".status.podIP")?;
    let seen = thread::scope(|scope| {
        let sessions = scope.spawn(|| field.exec("client", &["/usr/bin/python3", "-c", SESSIONS]));
        let is_there = |file: &str| Ok(field.exec("client", &["/bin/sh", "-c", file]).is_ok());
        kube.wait_for("the sessions to be open", 30, || is_there("test -e /tmp/open"))?;
        let cut = format!(
            "add table inet t-cut; add chain inet t-cut pods {{ type filter hook forward priority -300; }}; add rule inet t-cut pods ip saddr {address} drop; add rule inet t-cut pods ip daddr {address} drop"
        );
        host::output(kube.program("nft")?.arg(cut))?;
        // Longer than it takes to lose a request that waits for its answer.
        thread::sleep(Duration::from_secs(11));
        host::output(kube.program("nft")?.arg("delete table inet t-cut"))?;
        field.exec("client", &["/bin/sh", "-c", "touch /tmp/go"])?;
        sessions.join().unwrap_or_else(|_| bail!("the thread of the sessions panicked"))
    })?;
    ensure!(seen == "hello\n".repeat(3), "what became of three sessions:\n{seen}");
    let lost = field.kubectl(&["logs", "pod/client", "-c", "tulle-proxy"])?;
    ensure!(!lost.contains("UpstreamLost"), "the sidecar has given a session up: {lost}");
    Ok(())
}

/// Sends garbage, keeps its own end open, and prints for each port whether the other end was closed within 15 seconds.
const GARBAGE: &str = "import os, socket, sys
for port in sys.argv[2:]:
    connection = socket.create_connection((sys.argv[1], int(port)), timeout=15)
    try:
        connection.sendall(os.urandom(20000))
        while connection.recv(65536): pass
        print(port, 'closed')
    except TimeoutError:
        print(port, 'open')
    except OSError:
        print(port, 'closed')";

fn garbage(kube: &Kube) -> Result<()> {
    let (meshed, plain) =
        (TestNamespace::meshed(kube, "t-garbage")?, TestNamespace::plain(kube, "t-attacker")?);
    meshed.service("web", 1, &[])?;
    plain.client("attacker")?;
    let address =
        meshed.kubectl(&["get", "pod", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    let ports = ["8080", "26150", "26151", "26152", "26153", "9999"];
    let attack = [&["/usr/bin/python3", "-c", GARBAGE, address.as_str()], &ports[..]].concat();
    let ends = plain.exec("attacker", &attack)?;
    let closed: String = ports.iter().map(|port| format!("{port} closed\n")).collect();
    ensure!(ends == closed, "not every connection with garbage was closed: {ends}");
    ensure!(
        plain.status("attacker", "http://web.t-garbage.svc.cluster.local/")? == "200",
        "the pod no longer answers"
    );
    let restarts = meshed.kubectl(&[
        "get",
        "pod",
        "-l",
        "app=web",
        "-o",
        "jsonpath={.items[0].status.initContainerStatuses[1].restartCount}",
    ])?;
    ensure!(restarts == "0", "the sidecar was restarted {restarts} times");
    let logs = meshed.kubectl(&["logs", "deployment/web", "-c", "tulle-proxy"])?;
    ensure!(!logs.contains("panicked"), "the sidecar panicked: {logs}");
    Ok(())
}
