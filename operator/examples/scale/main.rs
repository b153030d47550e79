//! Measures the operator's core without Kubernetes: the real model and discovery server, and real gRPC streams
//! over TLS from simulated sidecars in a process of their own. Prints each figure beside its goal, and fails
//! when one is missed by more than half.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a measurement that panics has failed")]

#[path = "../../tests/client/mod.rs"]
mod client;
mod clients;
mod figures;
mod telemetry;
mod world;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rcgen::KeyPair;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tulle_mesh::proto::identity_server::Identity;
use tulle_mesh::proto::{SignRequest, SignResponse};
use tulle_operator::discovery::AckTracker;
use tulle_operator::discovery::relay::LeaderRelay;
use tulle_operator::discovery::server::{Services, serve};
use tulle_operator::identity::authority::Authority;
use tulle_operator::lease::Leadership;
use tulle_operator::run::own_tls;
use tulle_operator::telemetry::Aggregates;
use tulle_operator::watch::Hub;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Nothing that is waited for takes longer.
const BOUND: Duration = Duration::from_secs(60);
const LEAF: Duration = Duration::from_secs(3600);

/// Nobody needs to be signed for here.
struct Nobody;

#[tonic::async_trait]
impl Identity for Nobody {
    async fn sign(&self, _: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        Err(Status::unimplemented("certificates are in files"))
    }
}

/// The operator that is measured.
pub struct Operator {
    pub hub: Arc<Hub>,
    pub acks: Arc<AckTracker>,
    pub clients: Clients,
    _leading: watch::Sender<Leadership>,
}

/// The process of the simulated sidecars.
pub struct Clients {
    process: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
}

impl Clients {
    fn start(operator: SocketAddr, folder: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["clients", &operator.to_string()]).arg(folder);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let commands = process.stdin.take().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (sender, answers) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { process, commands, answers }
    }

    /// Gives a command, and returns the number that it is answered with.
    pub fn ask(&mut self, command: &str) -> f64 {
        writeln!(self.commands, "{command}").unwrap();
        self.commands.flush().unwrap();
        let Ok(answer) = self.answers.recv_timeout(BOUND) else {
            panic!("the clients do not answer {command}")
        };
        answer.trim().parse().unwrap()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        [] => with_more_files(),
        ["operator"] => {
            let missed = measure();
            std::process::exit(i32::from(missed));
        }
        ["clients", operator, folder] => clients::run(operator.parse().unwrap(), Path::new(folder)),
        other => panic!("unknown arguments {other:?}"),
    }
}

/// Thousands of connections are more files than a process may open by default.
fn with_more_files() {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n $(ulimit -H -n) && exec \"$0\" operator"]);
    // As in config/base/operator.yaml.
    command.env("_RJEM_MALLOC_CONF", "narenas:2,dirty_decay_ms:1000,muzzy_decay_ms:0");
    let status = command.arg(std::env::current_exe().unwrap()).status().unwrap();
    std::process::exit(status.code().unwrap_or(1));
}

/// Measures everything. Returns whether a goal was missed by more than half.
fn measure() -> bool {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let folder: PathBuf = std::env::temp_dir().join(format!("tulle-scale-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut operator = runtime.block_on(start(&folder));
    let figures = figures::all(&mut operator);
    drop(operator);
    let _ = std::fs::remove_dir_all(&folder);
    figures::print(&figures)
}

async fn start(folder: &Path) -> Operator {
    let authority = Authority::generate("cluster.local").unwrap().0;
    let key = KeyPair::generate().unwrap();
    let leaf = authority.sign(&key, &world::id("app"), LEAF).unwrap();
    std::fs::write(folder.join("root.der"), authority.root()).unwrap();
    std::fs::write(folder.join("leaf.der"), leaf.chain.first().unwrap()).unwrap();
    std::fs::write(folder.join("key.der"), key.serialize_der()).unwrap();
    let hub = Arc::new(Hub::complete(world::model()));
    let (acks, aggregates) = (Arc::new(AckTracker::default()), Arc::new(Aggregates::default()));
    let (leading, leadership) = watch::channel(Leadership { mine: true, ..Leadership::default() });
    let relay = LeaderRelay::new(Arc::clone(&acks), Arc::clone(&aggregates), Arc::clone(&hub), leadership);
    let tls = Arc::new(own_tls(&authority, &world::id("operator")).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let me = world::id("operator");
    let mut services = Services::new(Arc::clone(&hub), relay, Arc::clone(&acks), aggregates, me);
    // All come over loopback.
    services.check_addresses = false;
    tokio::spawn(serve(listener, tls, services, Nobody));
    Operator { hub, acks, clients: Clients::start(address, folder), _leading: leading }
}
