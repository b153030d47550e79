//! `tulle/1` over a TLS connection: many streams on one connection, each with credit of its own.
//!
//! One task drives a connection ([`drive`]): it splits what arrived among the streams and writes what they
//! have gathered since, in one go. Streams append to one shared output; there is no lock, no channel and no
//! task per request. The output is bounded by what the socket takes: senders of DATA wait for their turn.

mod connection;
mod driver;
mod output;
mod stream;

pub use connection::{Connection, Role, TLS_BUFFER};
pub use driver::drive;
pub use stream::{Event, Receiver, Sender, StreamError};

#[cfg(test)]
mod tests;
