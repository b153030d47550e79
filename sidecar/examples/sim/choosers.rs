//! Ways to choose a server: the sidecar's, and those that it is compared with.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tulle_sidecar::backend::{Ask, Backend, Backends, InFlight, Outcome, Upstream};
use tulle_sidecar::config::{ConfigStore, Destination, Endpoint, Endpoints, Route, ServiceRoute};

use super::world::SERVERS;

/// How fast plain latency forgets, in seconds.
const DECAY: f64 = 10.0;

/// A way to choose, and its column in the table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Random,
    LeastRequests,
    Ewma,
    /// The sidecar's, without what servers report.
    OwnView,
    Ours,
}

impl Way {
    pub const ALL: [Self; 5] = [Self::Random, Self::LeastRequests, Self::Ewma, Self::OwnView, Self::Ours];

    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "chance",
            Self::LeastRequests => "least requests",
            Self::Ewma => "EWMA to 0",
            Self::OwnView => "Tulle, own view",
            Self::Ours => "Tulle",
        }
    }
}

/// A Service with ten endpoints.
pub struct Service(Arc<Destination>);

/// How a request has ended, and what its server reports.
pub struct Ended {
    pub failed: bool,
    pub in_flight: u32,
    pub latency_us: Option<u32>,
}

/// One client's view of the servers.
pub enum Chooser {
    Plain { way: Way, seen: Vec<Seen> },
    Ours { backend: Rc<Backend>, hears_reports: bool },
}

/// A request that is under way.
pub enum Ticket {
    Plain,
    Ours(Rc<Upstream>, InFlight),
}

/// What plain latency knows of a server.
#[derive(Clone)]
pub struct Seen {
    pending: u32,
    /// Seconds; fades to nothing.
    latency: f64,
    at: Instant,
}

impl Service {
    pub async fn of_ten() -> Self {
        let (store, _wanted) = ConfigStore::new();
        let (address, name) = (SocketAddr::from(([10, 96, 0, 1], 80)), Arc::<str>::from("shop/web:80"));
        let endpoint = |number: usize| {
            let address = SocketAddr::from(([10, 0, 0, 1], number as u16 + 1));
            Endpoint { pod_uid: format!("pod-{number}").into(), ..Endpoint::at(address) }
        };
        let endpoints = (0..SERVERS).map(endpoint).collect();
        store.set_endpoints(&name, Endpoints { endpoints, ..Endpoints::default() });
        let entry = store.resolve(address).await;
        store.set_route(address, Route::Service(ServiceRoute { endpoints: name, ..ServiceRoute::default() }));
        Self(entry.current().expect("the Service is known"))
    }

    pub fn chooser(&self, way: Way, client: usize) -> Chooser {
        match way {
            Way::Random | Way::LeastRequests | Way::Ewma => {
                let seen = Seen { pending: 0, latency: 0.0, at: Instant::now() };
                Chooser::Plain { way, seen: vec![seen; SERVERS] }
            }
            Way::OwnView | Way::Ours => {
                let backends = Backends::of_client(&format!("client-{client}"));
                let backend = backends.of(&self.0).expect("a Service has a backend");
                Chooser::Ours { backend, hears_reports: way == Way::Ours }
            }
        }
    }
}

impl Chooser {
    /// The server of the next request.
    pub fn choose(&mut self) -> (usize, Ticket) {
        match self {
            Self::Plain { way, seen } => {
                let first = fastrand::usize(..SERVERS);
                let second = (first + 1 + fastrand::usize(..SERVERS - 1)) % SERVERS;
                let cost = |server: usize| seen[server].cost(*way);
                let server = if cost(first) <= cost(second) { first } else { second };
                seen[server].pending += 1;
                (server, Ticket::Plain)
            }
            Self::Ours { backend, .. } => {
                let upstream = backend.pick(&Ask::default()).expect("there are endpoints");
                let in_flight = upstream.begin();
                let server = usize::from(upstream.endpoint.address.port()) - 1;
                (server, Ticket::Ours(upstream, in_flight))
            }
        }
    }

    /// A request has ended.
    pub fn ended(&mut self, server: usize, ticket: Ticket, took: Duration, ended: &Ended) {
        match (self, ticket) {
            (Self::Plain { seen, .. }, _) => seen[server].learn(took.as_secs_f64()),
            (Self::Ours { hears_reports, .. }, Ticket::Ours(upstream, in_flight)) => {
                let outcome = if ended.failed { Outcome::Failed } else { Outcome::Answered(Instant::now()) };
                in_flight.end(Some(outcome));
                if *hears_reports {
                    upstream.report(Some(ended.in_flight), ended.latency_us, Instant::now());
                }
            }
            (Self::Ours { .. }, Ticket::Plain) => {}
        }
    }
}

impl Seen {
    fn cost(&self, way: Way) -> f64 {
        let load = f64::from(self.pending + 1);
        match way {
            Way::Random => 0.0,
            Way::LeastRequests => load,
            _ => self.faded() * load,
        }
    }

    fn weight(&self) -> f64 {
        (-self.at.elapsed().as_secs_f64() / DECAY).exp()
    }

    fn faded(&self) -> f64 {
        self.latency * self.weight()
    }

    /// A rise is believed at once, a fall with time; a failure is an answer like any other.
    fn learn(&mut self, took: f64) {
        self.pending -= 1;
        let weight = self.weight();
        self.latency = if took > self.faded() { took } else { self.latency * weight + took * (1.0 - weight) };
        self.at = Instant::now();
    }
}
