//! `tulle explain` against the sidecars, for every manifest of the official suite's tests of a mesh.
//!
//! In: the manifests of the suite, as released. For each, requests are derived from its routes ([`requests`]), sent by a
//! meshed pod, explained, and compared ([`compared`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::compared::{Pods, Said, Seen, difference};
use super::requests::{Request, ports, requests, text};
use crate::cli::exit;
use crate::cluster;
use crate::conformance;
use crate::kubectl::Kube;
use crate::progress::say;
use crate::suites::namespace::{TestNamespace, borrows};
use crate::suites::routes::settled;

/// The pod of each namespace that sends requests.
const CLIENT: &str = "client";

/// Until when the sidecars and the operator may know different versions of what has just changed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Calls of `tulle` at once. The operator answers four of one user, and may not have noticed yet that one has ended.
const CALLS: usize = 3;

/// Sends requests, each as often as it says, and prints what became of each.
const SENDS: &str = "import http.client, json, sys
def field(text, name):
    return next((line.split('=', 1)[1] for line in text.splitlines() if line.startswith(name + '=')), '')
def web(ask):
    connection = http.client.HTTPConnection(ask['host'], ask['port'], timeout=8)
    connection.putrequest(ask['method'], ask['path'], skip_host=True, skip_accept_encoding=True)
    for name, value in ask['headers']: connection.putheader(name, value)
    if ask['method'] != 'GET': connection.putheader('content-length', '0')
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode(errors='replace')
    connection.close()
    header = lambda name: answer.getheader(name) or ''
    return {'status': str(answer.status), 'reason': header('tulle-reason'), 'location': header('location'),
        'pod': field(body, 'Hostname'), 'path': field(body, 'URL')}
def call(ask):
    import grpc
    more = [(name, value) for name, value in ask['headers'] if name not in ('host', 'content-type')]
    with grpc.insecure_channel(ask['host'] + ':' + str(ask['port'])) as channel:
        try:
            body = channel.unary_unary(ask['path'])(b'', timeout=8, metadata=more)
            return {'status': 'OK', 'pod': field(body.decode(errors='replace'), 'Hostname')}
        except grpc.RpcError as error:
            told = dict(list(error.initial_metadata() or []) + list(error.trailing_metadata() or []))
            return {'status': error.code().name, 'reason': told.get('tulle-reason', '')}
def send(ask):
    try: return call(ask) if ask['grpc'] else web(ask)
    except Exception as error: return {'status': '000', 'error': repr(error)}
print(json.dumps([[send(ask) for _ in range(ask['times'])] for ask in json.loads(sys.argv[1])]))";

/// A request, and the namespace from which it is sent.
#[derive(Clone, Debug)]
struct Question {
    from: String,
    request: Request,
}

/// The suite's namespaces, with its Services and pods in them.
struct Mesh<'a> {
    kube: &'a Kube,
    /// By name.
    namespaces: BTreeMap<String, TestNamespace<'a>>,
    services: Vec<Value>,
    pods: Pods,
}

/// What has been compared so far.
#[derive(Default)]
struct Findings {
    requests: usize,
    differences: Vec<String>,
}

pub(super) fn agree(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let suite = cluster::gateway_api()?;
    ensure!(!suite.tests.is_empty(), "the suite has no manifests of tests of a mesh");
    conformance::install_needs(kube)?;
    let mesh = Mesh::new(kube, &suite.mesh)?;
    let mut findings = Findings::default();
    // Test MeshBasic has no manifest.
    let unrouted = mesh.unrouted()?;
    mesh.compare("no manifest", &unrouted, &mut findings)?;
    let mut covered = 0;
    for (name, manifest) in &suite.tests {
        let before = findings.requests;
        if let Err(error) = mesh.test(name, manifest, &mut findings) {
            findings.differences.push(format!("{name}: {error:#}"));
        }
        covered += usize::from(findings.requests > before);
    }
    let (all, Findings { requests, differences }) = (suite.tests.len(), findings);
    say(&format!("explain: compared {requests} requests of {covered} of the suite's {all} manifests"));
    ensure!(
        differences.is_empty(),
        "{} differences between explain and the sidecars:\n  {}",
        differences.len(),
        differences.join("\n  ")
    );
    ensure!(covered == all, "only {covered} of {all} manifests were compared");
    Ok(())
}

impl<'a> Mesh<'a> {
    /// Creates what all tests of the suite share, and a client in each namespace.
    fn new(kube: &'a Kube, manifests: &str) -> Result<Self> {
        let (of_namespaces, others): (Vec<Value>, Vec<Value>) =
            documents(manifests)?.into_iter().partition(|object| object["kind"] == "Namespace");
        let mut namespaces = BTreeMap::new();
        for object in of_namespaces {
            let name = text(&object, "/metadata/name")?;
            let mut labels = object["metadata"]["labels"].as_object().cloned().unwrap_or_default();
            labels.insert("tulle.dev/inject".to_owned(), json!("enabled"));
            let namespace = TestNamespace::new(kube, &name, Value::Object(labels))?;
            namespaces.insert(name, namespace);
        }
        ensure!(!namespaces.is_empty(), "the suite's manifests have no namespace");
        kube.apply(&json!({"apiVersion": "v1", "kind": "List", "items": others}).to_string())?;
        for namespace in namespaces.values() {
            namespace.client(CLIENT)?;
        }
        for object in others.iter().filter(|object| object["kind"] == "Deployment") {
            let name = format!("deployment/{}", text(object, "/metadata/name")?);
            kube.rolled_out(&text(object, "/metadata/namespace")?, &name, 120)?;
        }
        let services: Vec<Value> = others.into_iter().filter(|object| object["kind"] == "Service").collect();
        let pods = pods(kube, &services)?;
        let mesh = Self { kube, namespaces, services, pods };
        mesh.answers()?;
        Ok(mesh)
    }

    /// Waits until the application answers at every port that it is asked at.
    fn answers(&self) -> Result<()> {
        let mut asked = self.unrouted()?;
        for service in &self.services {
            for port in ports(service, true) {
                let from = text(service, "/metadata/namespace")?;
                asked.push(Question { from, request: Request::plain(service, port, true)? });
            }
        }
        let asked: Vec<&Question> = asked.iter().collect();
        let mut last = Vec::new();
        let waited = self.kube.wait_for("the suite's application to answer", 60, || {
            last = self.sent(&asked)?;
            Ok(last.iter().flatten().all(|seen| !seen.pod.is_empty()))
        });
        waited.with_context(|| format!("last seen: {last:?}"))
    }

    /// A request to each port for HTTP/1.1 of each Service, from each namespace.
    fn unrouted(&self) -> Result<Vec<Question>> {
        let mut questions = Vec::new();
        for from in self.namespaces.keys() {
            for service in &self.services {
                for port in ports(service, false) {
                    let request = Request::plain(service, port, false)?;
                    questions.push(Question { from: from.clone(), request });
                }
            }
        }
        ensure!(!questions.is_empty(), "the suite has no Service that speaks HTTP");
        Ok(questions)
    }

    /// Applies a manifest of the suite, compares all requests that its routes are about, and deletes it.
    fn test(&self, name: &str, manifest: &str, findings: &mut Findings) -> Result<()> {
        let objects = documents(manifest)?;
        ensure!(!objects.is_empty(), "the manifest is empty");
        let compared = self.applied(name, manifest, &objects, findings);
        for object in &objects {
            let place = object["metadata"]["namespace"].as_str().unwrap_or("default");
            let what =
                format!("{}/{}", text(object, "/kind")?.to_lowercase(), text(object, "/metadata/name")?);
            self.kube.run(&["-n", place, "delete", &what, "--ignore-not-found"])?;
        }
        compared
    }

    fn applied(&self, name: &str, manifest: &str, objects: &[Value], findings: &mut Findings) -> Result<()> {
        self.kube.apply(manifest)?;
        let is_route = |object: &&Value| object["kind"].as_str().is_some_and(|kind| kind.ends_with("Route"));
        let routes: Vec<&Value> = objects.iter().filter(is_route).collect();
        ensure!(!routes.is_empty(), "the manifest has no route");
        let (mut questions, mut wanted) = (Vec::new(), Vec::new());
        for route in routes {
            let (kind, own) = (text(route, "/kind")?, text(route, "/metadata/namespace")?);
            let route_name = text(route, "/metadata/name")?;
            let asked = requests(route, &self.services)?;
            // A route in another namespace than its parent holds for clients of its own.
            let mut clients: BTreeSet<&str> =
                asked.iter().map(|request| request.namespace.as_str()).collect();
            clients.insert(&own);
            for from in clients {
                let question =
                    |request: &Request| Question { from: from.to_owned(), request: request.clone() };
                questions.extend(asked.iter().map(question));
            }
            let namespace = self.namespace(&own)?;
            settled(namespace, &format!("{}/{route_name}", kind.to_lowercase()))?;
            wanted.push(format!("{kind}/{own}/{route_name}"));
        }
        let deciding = self.compare(name, &questions, findings)?;
        for route in wanted.iter().filter(|route| !deciding.contains(*route)) {
            findings.differences.push(format!("{name}: explain names {route} for none of its requests"));
        }
        Ok(())
    }

    fn namespace(&self, name: &str) -> Result<&TestNamespace<'a>> {
        self.namespaces.get(name).with_context(|| format!("the suite has no namespace {name}"))
    }

    /// Sends and explains requests until both agree about all of them, or for [`PATIENCE`]. Adds those about which they do
    /// not; returns the routes that decide.
    fn compare(
        &self,
        name: &str,
        questions: &[Question],
        findings: &mut Findings,
    ) -> Result<BTreeSet<String>> {
        let start = Instant::now();
        let mut deciding = BTreeSet::new();
        let mut open: Vec<&Question> = questions.iter().collect();
        loop {
            // Before all that is asked: however long that takes, what differs is asked again.
            let asked = start.elapsed();
            let seen = self.sent(&open)?;
            let said = explained(self.kube, &open)?;
            let mut left = Vec::new();
            let mut differences = Vec::new();
            for ((question, seen), said) in open.iter().zip(&seen).zip(said) {
                let found = match said {
                    Ok(said) => {
                        let found = difference(&question.request, &said, seen, &self.pods);
                        deciding.insert(said.route);
                        found
                    }
                    Err(error) => Some(format!("{error:#}")),
                };
                if let Some(found) = found {
                    let Request { method, path, headers, .. } = &question.request;
                    let to = question.request.destination();
                    let from = &question.from;
                    differences
                        .push(format!("{name}: {method} {path} {headers:?} from {from} to {to}: {found}"));
                    left.push(*question);
                }
            }
            if left.is_empty() || asked > PATIENCE {
                findings.requests += questions.len();
                findings.differences.extend(differences);
                return Ok(deciding);
            }
            open = left;
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// Sends requests from their namespaces. Returns what became of each, in their order.
    fn sent(&self, questions: &[&Question]) -> Result<Vec<Vec<Seen>>> {
        let mut all: Vec<Vec<Seen>> = vec![Vec::new(); questions.len()];
        for (from, namespace) in &self.namespaces {
            let own = |(_, question): &(usize, &&Question)| question.from == *from;
            let (places, asked): (Vec<usize>, Vec<Value>) = questions
                .iter()
                .enumerate()
                .filter(own)
                .map(|(place, question)| (place, asked(&question.request)))
                .unzip();
            if asked.is_empty() {
                continue;
            }
            let argument = Value::Array(asked).to_string();
            let printed = namespace.exec(CLIENT, &["/usr/bin/python3", "-c", SENDS, &argument])?;
            let answers: Vec<Vec<Value>> =
                serde_json::from_str(&printed).with_context(|| format!("the client printed {printed:?}"))?;
            ensure!(answers.len() == places.len(), "{} answers to {} requests", answers.len(), places.len());
            for (place, answers) in places.into_iter().zip(answers) {
                all[place] = answers.iter().map(Seen::read).collect();
            }
        }
        Ok(all)
    }
}

/// A request as the client's program reads it.
fn asked(request: &Request) -> Value {
    let Request { port, grpc, method, path, headers, times, .. } = request;
    json!({"host": request.host(), "port": port, "grpc": grpc, "method": method, "path": path,
        "headers": headers, "times": times})
}

/// What `tulle explain` says of each request, in their order.
fn explained(kube: &Kube, questions: &[&Question]) -> Result<Vec<Result<Said>>> {
    let next = AtomicUsize::new(0);
    let all = Mutex::new(Vec::with_capacity(questions.len()));
    thread::scope(|scope| {
        for _ in 0..CALLS {
            scope.spawn(|| {
                loop {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(question) = questions.get(place) else { break };
                    let said = explain(kube, question);
                    all.lock().unwrap_or_else(PoisonError::into_inner).push((place, said));
                }
            });
        }
    });
    let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.sort_by_key(|(place, _)| *place);
    ensure!(all.len() == questions.len(), "{} of {} requests were explained", all.len(), questions.len());
    Ok(all.into_iter().map(|(_, said)| said).collect())
}

/// Asks about one request.
fn explain(kube: &Kube, question: &Question) -> Result<Said> {
    let request = &question.request;
    let (source, destination) = (format!("{}/{CLIENT}", question.from), request.destination());
    let headers: Vec<String> =
        request.headers.iter().map(|(name, value)| format!("{name}:{value}")).collect();
    let mut words = vec!["-A", "explain", &source, &destination, "-o", "json"];
    words.extend(["--method", &request.method, "--path", &request.path]);
    words.extend(headers.iter().flat_map(|header| ["--header", header]));
    let printed = kube.tulle_ended(&words)?;
    if ![exit::FINE, exit::FINDINGS].contains(&printed.code) {
        bail!("tulle {} ended with {}: {}", words.join(" "), printed.code, printed.stderr.trim());
    }
    let said = Said::read(&printed.json()?, request)?;
    let fine = printed.code == exit::FINE;
    ensure!(said.reaches == fine, "exit code {} of {said:?}", printed.code);
    Ok(said)
}

/// The pods behind each Service.
fn pods(kube: &Kube, services: &[Value]) -> Result<Pods> {
    let mut found = Pods::new();
    for service in services {
        let (namespace, name) = (text(service, "/metadata/namespace")?, text(service, "/metadata/name")?);
        let selector = service["spec"]["selector"].as_object();
        let selector = selector.with_context(|| format!("Service {namespace}/{name} selects no pods"))?;
        let labels: Vec<String> = selector
            .iter()
            .map(|(label, value)| format!("{label}={}", value.as_str().unwrap_or("")))
            .collect();
        let pods = kube.pods(&namespace, &labels.join(","))?;
        ensure!(!pods.is_empty(), "Service {namespace}/{name} has no pods");
        found.insert(format!("{namespace}/{name}"), pods.into_iter().collect());
    }
    Ok(found)
}

/// The objects of a manifest.
fn documents(manifest: &str) -> Result<Vec<Value>> {
    let mut documents = vec![String::new()];
    for line in manifest.lines() {
        if line.trim_end() == "---" {
            documents.push(String::new());
        } else if let Some(last) = documents.last_mut() {
            last.push_str(line);
            last.push('\n');
        }
    }
    let is_empty = |line: &str| line.trim().is_empty() || line.starts_with('#');
    let full = documents.iter().filter(|document| !document.lines().all(is_empty));
    full.map(|document| {
        serde_yaml::from_str::<Value>(document).with_context(|| format!("not YAML: {document}"))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::requests::ECHO;
    use super::*;

    #[test]
    fn the_objects_of_a_manifest_are_read_without_empty_ones() {
        let manifest = "---\n# Copyright\n---\nkind: A\nspec:\n  text: a---b\n---\nkind: B\n---\n";
        let found = documents(manifest).unwrap();
        assert_eq!(found, [json!({"kind": "A", "spec": {"text": "a---b"}}), json!({"kind": "B"})]);
        assert!(documents("kind: [").is_err());
    }

    #[test]
    fn the_client_reads_all_of_a_request() {
        let service = json!({"metadata": {"namespace": "mesh", "name": "echo"}});
        let call = asked(&Request::plain(&service, 7070, true).unwrap());
        let headers = json!([["host", "echo.mesh"], ["content-type", "application/grpc"]]);
        let expected = json!({"host": "echo.mesh", "port": 7070, "grpc": true, "method": "POST", "path": ECHO,
            "headers": headers, "times": 1});
        assert_eq!(call, expected);
    }
}
