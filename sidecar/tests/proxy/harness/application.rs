//! What listens in a pod, and how many connections it has taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::cluster::{Pod, Port};

/// An application; it ends with this value, as far as its listener is concerned.
pub struct Application {
    /// How it is reached.
    pub port: Port,
    accepted: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Application {
    /// Starts an application that serves each connection like this.
    pub fn start<F>(pod: &Pod, serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (listener, port) = pod.listener(1024);
        Self::on(listener, port, serve)
    }

    /// The same with a listener that is there already.
    pub fn on<F>(listener: TcpListener, port: Port, serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream));
            }
        });
        Self { port, accepted, accepting }
    }

    /// Connections that it has taken.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}
