//! `tulle dashboard`: the operator's page, through a port-forward.
//!
//! ```text
//!   door      who may use it, and what is passed on
//!   address   addresses that are about a Canary
//!   actions   what a form of the page changes, with --allow-actions
//!   running   actions that are under way
//!   answers   answers of this command itself
//! ```
//! In: requests of a browser on this machine. Out: the same requests, with a token, to the operator. The token never
//! leaves this process but to the operator. With --allow-actions, forms of the page are not passed on: this process does
//! what they ask for, because it has the rights of the user, and the operator has none to act on Canaries.

mod actions;
mod address;
mod answers;
mod door;
mod running;

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kube::Client;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};
use tulle_mesh::ports;

use crate::cluster::operator::{Tunnel, tunnel};
use crate::cluster::{Context, Located, failure, within};
use crate::commands::canary::action::Undone;
use crate::exit::CliError;
use crate::output::{self, Output};

use actions::Actions;
use address::{Address, Asked};
use answers::{Body, done, not_done, opened, text};
use door::{Door, Entry, Form};
use running::Running;

/// How long a token holds.
const LIFETIME: Duration = Duration::from_secs(3_600);
/// How often there is a new one.
const RENEWAL: Duration = Duration::from_secs(1_800);
/// How long the head of a request may take, and a form.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// The longest form, in bytes: a token, the name of a revision, a phase and a step.
const MAX_FORM: usize = 4_096;

/// Options of `tulle dashboard`.
#[derive(clap::Args)]
pub struct Args {
    /// The local port; 26162, or another that is free, if absent
    #[arg(long)]
    port: Option<u16>,
    /// Offer promote, pause, resume, abort and retry on the pages of Canaries that you may change; they act with your rights
    #[arg(long)]
    allow_actions: bool,
}

/// What every request needs.
struct Page {
    door: Door,
    client: Client,
    /// `None`: nothing can be changed.
    actions: Option<Actions>,
    running: Arc<Running<(Asked, Form), Result<(), Undone>>>,
    output: Output,
    access: Mutex<Access>,
    /// A port-forward has failed.
    failed: Notify,
}

/// Where the operator is, and what it takes.
#[derive(Clone)]
struct Access {
    at: Located,
    token: String,
}

/// Runs `tulle dashboard` until Ctrl-C.
///
/// # Errors
/// The operator cannot be found, or the local port is taken.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let found = context.replicas().await?;
    let token = context.token(&found.first, LIFETIME).await?;
    let at = context.leader(found, &token).await?;
    if let Some(note) = at.note() {
        crate::exit::note(&note);
    }
    let client = context.streams().await?;
    // The first browser must not be the one to find out that ports may not be forwarded.
    drop(within("forwarding a port of the operator", tunnel(&client, &at)).await?);
    let (listener, address) = listen(args.port).await?;
    let actions = match args.allow_actions {
        true => Some(Actions::new(context.client().await?, client.clone())),
        false => None,
    };
    let page = Arc::new(Page {
        door: Door::new(address.port(), args.allow_actions)?,
        client,
        actions,
        running: Arc::default(),
        output: context.output,
        access: Mutex::new(Access { at, token }),
        failed: Notify::new(),
    });
    output::write(&format!("{}\n", page.door.address()))?;
    crate::exit::note("Open this address in your browser. It shows what you may see. Ctrl-C ends it.");
    if args.allow_actions {
        crate::exit::note("It can change rollouts with your rights, and each change is noted here.");
    }
    let mut renewal = interval(RENEWAL);
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    renewal.tick().await;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (browser, _) = accepted
                    .map_err(|error| CliError::failed(format!("cannot accept connections at {address}: {error}")))?;
                tokio::spawn(serve(browser, Arc::clone(&page)));
            }
            interrupted = tokio::signal::ctrl_c() => {
                return interrupted.map_err(|error| CliError::failed(format!("cannot wait for Ctrl-C: {error}")));
            }
            () = page.failed.notified() => page.find(context).await,
            _ = renewal.tick() => page.renew(context).await,
        }
    }
}

impl Page {
    fn access(&self) -> Access {
        self.access.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the page at this address offers actions.
    async fn offers(&self, head: &Parts) -> bool {
        let (Some(actions), Some(address)) = (&self.actions, Address::parse(head.uri.path())) else {
            return false;
        };
        if head.method != Method::GET {
            return false;
        }
        match actions.may_act(address.namespace, address.name).await {
            Ok(may) => may,
            Err(error) => {
                error.print(&self.output);
                false
            }
        }
    }

    /// Another replica may lead by now.
    async fn find(&self, context: &Context) {
        let token = self.access().token;
        let found = async { context.leader(context.replicas().await?, &token).await };
        match found.await {
            Ok(at) => self.access.lock().unwrap_or_else(PoisonError::into_inner).at = at,
            Err(error) => error.print(&self.output),
        }
    }

    /// The former token holds for a while yet if there is no new one.
    async fn renew(&self, context: &Context) {
        let at = self.access().at;
        match context.token(&at, LIFETIME).await {
            Ok(token) => self.access.lock().unwrap_or_else(PoisonError::into_inner).token = token,
            Err(error) => error.print(&self.output),
        }
    }
}

/// A listener on this machine only: at the port that is wanted, or at the usual one or another.
async fn listen(wanted: Option<u16>) -> Result<(TcpListener, SocketAddr), CliError> {
    let at = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let bound = match wanted {
        Some(port) => at(port).await,
        None => match at(ports::QUERY).await {
            Ok(listener) => Ok(listener),
            Err(_) => at(0).await,
        },
    };
    let listening = bound.and_then(|listener| listener.local_addr().map(|address| (listener, address)));
    listening.map_err(|error| {
        let port = wanted.unwrap_or(ports::QUERY);
        CliError::failed(format!("cannot listen at 127.0.0.1:{port}: {error}"))
            .hint("choose another with --port")
    })
}

/// Answers the requests of one connection of a browser.
async fn serve(browser: TcpStream, page: Arc<Page>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let page = Arc::clone(&page);
        async move { Ok::<_, Infallible>(answer(&page, request).await) }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
    // Browsers close connections as they please.
    let _ = server.serve_connection(TokioIo::new(browser), service).await;
}

async fn answer(page: &Arc<Page>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    match page.door.judge(&head) {
        Entry::Refused(status, why) => text(status, why),
        Entry::Opens(cookie) => opened(&cookie),
        Entry::Acts(asked) => act(page, asked, body).await,
        Entry::Enters => match forward(page, head, body).await {
            Ok(response) => response,
            Err(error) => {
                error.print(&page.output);
                page.failed.notify_one();
                text(StatusCode::BAD_GATEWAY, &error.to_string())
            }
        },
    }
}

/// Does what a form asks for, if it brings the token. It is done even if the browser does not wait for the answer.
async fn act(page: &Arc<Page>, asked: Asked, body: Incoming) -> Response<Body> {
    let read = tokio::time::timeout(HEAD_WITHIN, Limited::new(body, MAX_FORM).collect()).await;
    let Ok(Ok(read)) = read else {
        return text(StatusCode::BAD_REQUEST, "The form is too long, or has not arrived.");
    };
    let Some(form) = page.door.form(&read.to_bytes()) else {
        return text(
            StatusCode::FORBIDDEN,
            "The form is not one of this page. Open the page of the Canary again.",
        );
    };
    let work = {
        let (page, asked, form) = (Arc::clone(page), asked.clone(), form.clone());
        async move { carry_out(&page, &asked, form).await }
    };
    let answer = page.running.share((asked.clone(), form), work).await;
    match answer {
        Some(Ok(())) => done(&asked),
        Some(Err(undone)) => not_done(&asked, &undone),
        None => {
            not_done(&asked, &Undone::Unconfirmed(CliError::failed("`tulle dashboard` has lost the action")))
        }
    }
}

/// Requests an action, and says on standard error that it was asked for and what came of it: whoever has the cookie can
/// ask, so it does not happen unseen.
async fn carry_out(page: &Page, asked: &Asked, form: Form) -> Result<(), Undone> {
    let Some(actions) = &page.actions else {
        return Err(Undone::Not(CliError::failed("this page changes nothing")));
    };
    crate::exit::note(&format!("The page asks for: {}", asked.command()));
    match actions.act(asked, form).await {
        Ok(sentence) => {
            crate::exit::note(&sentence);
            Ok(())
        }
        Err(undone) => {
            CliError::from(undone.clone()).print(&page.output);
            Err(undone)
        }
    }
}

/// Sends a request over a port-forward of its own.
async fn forward(page: &Page, mut head: Parts, body: Incoming) -> Result<Response<Body>, CliError> {
    let Access { at, token } = page.access();
    let offers = page.offers(&head).await;
    door::readdress(&mut head, &token)?;
    if offers {
        page.door.offer(&mut head.headers);
    }
    let Tunnel { stream, refused } =
        within("forwarding a port of the operator", tunnel(&page.client, &at)).await?;
    let exchanged = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let response = sender.send_request(Request::from_parts(head, body)).await?;
        // It ends with the answer, because the request says so; until then the sender keeps it.
        tokio::spawn(async move {
            let _ = connection.await;
            drop(sender);
        });
        Ok::<_, hyper::Error>(response)
    };
    let response = tokio::select! {
        biased;
        Some(why) = refused => return Err(failure::refusal(&at, &why)),
        exchanged = exchanged => exchanged.map_err(|error| {
            CliError::failed(format!("the connection to the operator broke: {}", failure::chain(&error)))
        })?,
    };
    let (mut head, body) = response.into_parts();
    door::end_to_end(&mut head.headers);
    Ok(Response::from_parts(head, body.boxed_unsync()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_port_is_used_if_the_usual_one_is_taken_but_not_if_one_is_asked_for() {
        let (first, taken) = listen(Some(0)).await.unwrap();
        assert!(taken.ip().is_loopback());
        let error = listen(Some(taken.port())).await.unwrap_err();
        assert!(error.to_string().contains(&taken.port().to_string()), "{error}");
        drop(first);
        // Whether or not somebody holds the usual port, there are two listeners.
        let (one, a) = listen(None).await.unwrap();
        let (_other, b) = listen(None).await.unwrap();
        assert_ne!(a, b);
        drop(one);
    }
}
