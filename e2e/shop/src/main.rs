//! The sample shop: a service that calls the next one and can return errors, and a load generator.

mod load;
mod serve;

use clap::Parser;
use hyper::header::HeaderValue;

/// The sample shop.
#[derive(Parser)]
enum Command {
    /// Serves requests.
    Serve(serve::Serve),
    /// Sends requests at a fixed rate and counts the responses.
    Load(load::Load),
    /// Sends one request, and prints the status and the body, or where a redirect leads.
    Get {
        /// `host:port` of the service.
        target: String,
        /// Path of the request.
        #[arg(long, default_value = "/")]
        path: String,
        /// A header of the request, `name: value`.
        #[arg(long)]
        header: Option<String>,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Serve(serve) => serve.run().await,
        Command::Load(load) => load.run().await,
        Command::Get { target, path, header } => {
            let header = header.as_deref().and_then(|header| header.split_once(": "));
            let headers: Vec<(&str, HeaderValue)> = match header {
                Some((name, value)) => vec![(name, value.parse()?)],
                None => Vec::new(),
            };
            let answer = serve::get(&target, &path, &headers).await?;
            let body = String::from_utf8_lossy(&answer.body);
            println!("{} {}", answer.status.as_u16(), answer.location.as_deref().unwrap_or(body.trim()));
            Ok(())
        }
    }
}
