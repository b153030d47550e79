//! `tulle dashboard`: the operator's page, through a port-forward.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kube::Client;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tulle_mesh::ports;

use crate::cluster::operator::{Tunnel, tunnel};
use crate::cluster::{Context, Located, failure, within};
use crate::exit::CliError;
use crate::output;

/// How long the page may be looked at. Afterwards the command is started again.
const LIFETIME: Duration = Duration::from_secs(3_600);

/// Options of `tulle dashboard`.
#[derive(clap::Args)]
pub struct Args {
    /// The local port; 26162, or another that is free, if absent
    #[arg(long)]
    port: Option<u16>,
}

/// Runs `tulle dashboard` until Ctrl-C.
///
/// # Errors
/// The operator cannot be found, or the local port is taken.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let mut located = context.locate().await?;
    let token = context.token(&located, LIFETIME).await?;
    let client = context.client().await?;
    // The first browser must not be the one to find out that ports may not be forwarded.
    drop(within("forwarding a port of the operator", tunnel(&client, &located)).await?);
    let (listener, address) = listen(args.port).await?;
    output::write(&format!("http://{address}/login?token={token}\n"))?;
    eprintln!("Open this address in a browser. It shows what you may see, for an hour. Ctrl-C ends it.");
    let failed = Arc::new(AtomicBool::new(false));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            interrupted = tokio::signal::ctrl_c() => {
                return interrupted.map_err(|error| CliError::failed(format!("cannot wait for Ctrl-C: {error}")));
            }
        };
        let (browser, _) = accepted
            .map_err(|error| CliError::failed(format!("cannot accept connections at {address}: {error}")))?;
        if failed.swap(false, Ordering::Relaxed) {
            // Another replica may lead by now.
            match context.locate().await {
                Ok(found) => located = found,
                Err(error) => error.print(&context.output),
            }
        }
        let (client, at, failed) = (client.clone(), located.clone(), Arc::clone(&failed));
        let output = context.output;
        tokio::spawn(async move {
            if let Err(error) = forward(&client, &at, browser).await {
                failed.store(true, Ordering::Relaxed);
                error.print(&output);
            }
        });
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

/// Carries one connection of the browser over a port-forward of its own.
async fn forward(client: &Client, at: &Located, mut browser: TcpStream) -> Result<(), CliError> {
    let Tunnel { mut stream, refused } =
        within("forwarding a port of the operator", tunnel(client, at)).await?;
    tokio::select! {
        biased;
        Some(why) = refused => Err(failure::refusal(at, &why)),
        // Browsers close connections as they please.
        _ = copy_bidirectional(&mut browser, &mut stream) => Ok(()),
    }
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
