//! Serves HTTP/2 by itself, for suites that test a server: `cargo run --example http2 -- 127.0.0.1:8080`. Prints the address.
//! Every request is read to its end, and answered with 64 KiB.

use bytes::{Bytes, BytesMut};
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_local};
use tulle_sidecar::http1::{Head, Part};
use tulle_sidecar::http2::Server;

fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind(address).await?;
        println!("{}", listener.local_addr()?);
        loop {
            let (stream, _) = listener.accept().await?;
            spawn_local(async move {
                let mut server = Server::new(stream, BytesMut::new());
                while let Some(Ok((_, mut send, mut receive))) = server.accept().await {
                    spawn_local(async move {
                        while let Ok(Part::Data(_) | Part::Trailers(_)) = receive.part().await {}
                        let body = Bytes::from_static(&[b'x'; 64 * 1024]);
                        if send.head(&Head::answer(200, "OK", body.len()), false).is_ok()
                            && send.data(body).await.is_ok()
                        {
                            let _ = send.end(None);
                        }
                    });
                }
            });
        }
    })
}
