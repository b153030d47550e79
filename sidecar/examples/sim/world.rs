//! Servers, arrivals and time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tokio::time::{Instant, advance};
use tulle_sidecar::app_latency::AppLatency;

use super::choosers::{Chooser, Ended, Service, Ticket, Way};

pub const SERVERS: usize = 10;
const WORKERS: usize = 4;
/// What a server takes for a request, on average and in seconds.
const WORK: f64 = 0.02;
/// How much longer the slow one takes.
const SLOWER: f64 = 10.0;
/// When the failing one has failed.
const FAILS_AFTER: f64 = 0.002;
/// The server that is slow or fails.
const BAD: usize = 0;

/// Who sends how many requests.
#[derive(Clone, Copy)]
pub struct Load {
    pub clients: usize,
    /// Of each, in a second.
    pub rate: f64,
}

/// What is wrong with one server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    Slow,
    Fails,
}

/// One cell of the table.
#[derive(Clone, Copy)]
pub struct Figures {
    /// Of the bad server, 0 to 1.
    pub share: f64,
    pub p99_ms: f64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A client sends a request.
    Arrival(usize),
    /// A server has done with a request.
    Done(usize, usize),
}

/// What happens, in order.
#[derive(Default)]
struct Agenda {
    events: BinaryHeap<Reverse<(Duration, usize, Event)>>,
    made: usize,
}

impl Agenda {
    fn add(&mut self, at: Duration, event: Event) {
        self.made += 1;
        self.events.push(Reverse((at, self.made, event)));
    }
}

struct Request {
    client: usize,
    server: usize,
    since: Duration,
    /// Drawn when it is sent, so that it is the same whoever serves it.
    work: f64,
    ticket: Option<Ticket>,
}

#[derive(Default)]
struct Server {
    busy: usize,
    waiting: VecDeque<usize>,
    latency: AppLatency,
    in_flight: u32,
}

/// One cell: so many requests, chosen in this way.
pub async fn simulate(load: Load, fault: Fault, way: Way, service: &Service, requests: usize) -> Figures {
    // Of its own: what a way draws must not change when requests arrive.
    let mut arrivals = fastrand::Rng::with_seed(fastrand::u64(..));
    let mut choosers: Vec<Chooser> = (0..load.clients).map(|client| service.chooser(way, client)).collect();
    let mut servers: Vec<Server> = (0..SERVERS).map(|_| Server::default()).collect();
    let (mut agenda, mut all, mut now) = (Agenda::default(), Vec::<Request>::new(), Duration::ZERO);
    let (mut sent_to_bad, mut latencies) = (0usize, Vec::new());
    for client in 0..load.clients {
        agenda.add(exponential(&mut arrivals, 1.0 / load.rate), Event::Arrival(client));
    }
    let counts = |request: usize| request >= requests / 10;
    while let Some(Reverse((at, _, event))) = agenda.events.pop() {
        advance(at - now).await;
        now = at;
        match event {
            Event::Arrival(_) if all.len() >= requests => {}
            Event::Arrival(client) => {
                let (server, ticket) = choosers[client].choose();
                let number = all.len();
                sent_to_bad += usize::from(server == BAD && counts(number));
                let work = exponential(&mut arrivals, WORK).as_secs_f64();
                all.push(Request { client, server, since: now, work, ticket: Some(ticket) });
                servers[server].in_flight += 1;
                if fault == Fault::Fails && server == BAD {
                    agenda.add(now + Duration::from_secs_f64(FAILS_AFTER), Event::Done(server, number));
                } else {
                    servers[server].waiting.push_back(number);
                    serve(server, &mut servers[server], fault, &all, now, &mut agenda);
                }
                agenda.add(now + exponential(&mut arrivals, 1.0 / load.rate), Event::Arrival(client));
            }
            Event::Done(server, number) => {
                let request = &mut all[number];
                let took = now - request.since;
                let failed = fault == Fault::Fails && server == BAD;
                let here = &mut servers[server];
                here.in_flight -= 1;
                here.latency.note(took, failed, Instant::now());
                let ended = Ended {
                    failed,
                    in_flight: here.in_flight,
                    latency_us: here.latency.micros(Instant::now()),
                };
                if let Some(ticket) = request.ticket.take() {
                    choosers[request.client].ended(request.server, ticket, took, &ended);
                }
                if counts(number) && !failed {
                    latencies.push(took);
                }
                if !failed {
                    here.busy -= 1;
                    serve(server, here, fault, &all, now, &mut agenda);
                }
            }
        }
    }
    latencies.sort_unstable();
    let p99 = latencies.get(latencies.len() * 99 / 100).copied().unwrap_or_default();
    let counted = (requests - requests / 10) as f64;
    Figures { share: sent_to_bad as f64 / counted, p99_ms: p99.as_secs_f64() * 1e3 }
}

/// Gives what waits to the workers that are free.
fn serve(
    number: usize,
    server: &mut Server,
    fault: Fault,
    all: &[Request],
    now: Duration,
    agenda: &mut Agenda,
) {
    while server.busy < WORKERS
        && let Some(next) = server.waiting.pop_front()
    {
        server.busy += 1;
        let slower = if fault == Fault::Slow && number == BAD { SLOWER } else { 1.0 };
        agenda.add(now + Duration::from_secs_f64(all[next].work * slower), Event::Done(number, next));
    }
}

fn exponential(random: &mut fastrand::Rng, mean: f64) -> Duration {
    Duration::from_secs_f64(-mean * (1.0 - random.f64()).ln())
}
