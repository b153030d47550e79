//! How long a change of a route takes to reach a client.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{backend, http, meshed, response_header, settled};
use crate::host;
use crate::kubectl::Kube;
use crate::progress::say;
use crate::suites::Skip;

/// Sends requests all the time and notes when it first saw each mark. `/` of port 9000 answers with the last one.
const WATCHES: &str = "import http.client, http.server, json, threading, time
last = ['', 0.0]
def watch():
    connection = http.client.HTTPConnection('web', timeout=8)
    while True:
        connection.request('GET', '/')
        answer = connection.getresponse(); answer.read()
        mark = answer.getheader('x-route') or ''
        if mark != last[0]: last[:] = [mark, time.time()]
        time.sleep(0.002)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        text = json.dumps(last).encode()
        self.send_response(200); self.send_header('content-length', str(len(text))); self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_): pass
threading.Thread(target=watch, daemon=True).start()
http.server.ThreadingHTTPServer(('', 9000), Handler).serve_forever()";

/// Changes the route a hundred times, one change after the effect of the other. Prints the milliseconds from the request
/// that changes it until the client saw the effect; null after ten seconds.
const CHANGES: &str = "import base64, http.client, json, os, random, ssl, sys, tempfile, time, urllib.parse
config = json.loads(os.environ['TULLE_TEST_KUBECONFIG'])
def file(data):
    made = tempfile.NamedTemporaryFile(delete=False); made.write(base64.b64decode(data)); made.close()
    return made.name
cluster, user = config['clusters'][0]['cluster'], config['users'][0]['user']
names = [file(data) for data in (cluster['certificate-authority-data'], user['client-certificate-data'], user['client-key-data'])]
context = ssl.create_default_context(cafile=names[0]); context.load_cert_chain(names[1], names[2])
[os.unlink(name) for name in names]
api = http.client.HTTPSConnection(urllib.parse.urlparse(cluster['server']).netloc, context=context, timeout=10)
client = http.client.HTTPConnection(sys.argv[2], 9000, timeout=10)
path, took = sys.argv[1], []
for number in range(100):
    mark = f'change-{number}'
    filters = [{'type': 'ResponseHeaderModifier', 'responseHeaderModifier': {'set': [{'name': 'x-route', 'value': mark}]}}]
    patch = [{'op': 'replace', 'path': '/spec/rules/0/filters', 'value': filters}]
    begin, effect = time.time(), None
    api.request('PATCH', path, json.dumps(patch), {'content-type': 'application/json-patch+json'})
    answer = api.getresponse(); text = answer.read()
    assert answer.status == 200, text
    while effect is None and time.time() < begin + 10:
        client.request('GET', '/')
        seen, when = json.loads(client.getresponse().read())
        if seen == mark: effect = (when - begin) * 1000
        else: time.sleep(0.02)
    took.append(effect)
    time.sleep(random.uniform(0.02, 0.12))
print(json.dumps(took))";

pub(super) fn hundred(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else {
        bail!(Skip("it compares clocks of the client and this machine"))
    };
    let field = meshed(kube, "t-r-changes")?;
    field.service("web", 1, &[])?;
    let rules = json!([{"filters": [response_header("x-route", "first")], "backendRefs": [backend("web")]}]);
    field.apply(http("web", "web", rules))?;
    field.server_pod("client", 9000, &["/usr/bin/python3", "-c", WATCHES])?;
    settled(&field, "httproute/web")?;
    let config = kube.run(&["config", "view", "--raw", "--minify", "--flatten", "-o", "json"])?;
    let route = "/apis/gateway.networking.k8s.io/v1/namespaces/t-r-changes/httproutes/web";
    let client = field.get("pod/client", ".status.podIP")?;
    let mut changes: Command = cluster.inside("/usr/bin/python3")?;
    changes.env("TULLE_TEST_KUBECONFIG", config).args(["-c", CHANGES, route, &client]);
    let text = host::output(&mut changes)?;
    let took: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("it printed {text:?}"))?;
    let mut millis: Vec<f64> = took.iter().filter_map(Value::as_f64).collect();
    ensure!(millis.len() == 100, "{} of 100 changes took effect within 10 s: {text}", millis.len());
    millis.sort_by(f64::total_cmp);
    say(&format!(
        "        a change of a route reached the client after p50 {:.0} ms, p99 {:.0} ms (goal: 200 ms), at most {:.0} ms",
        millis[49], millis[98], millis[99]
    ));
    Ok(())
}
