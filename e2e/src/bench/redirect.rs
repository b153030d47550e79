//! Redirect rules for the proxies that Tulle is compared with: connections reach them as they reach Tulle's sidecars, and
//! cost the kernel as much (`tulle-sidecar init` installs Tulle's own).

use std::fs;
use std::process::Command;

use anyhow::Result;

use super::proxies::Targets;
use super::testbed::{CLIENT, SERVER, Testbed};
use crate::host;

/// Address of the Service, to which the client connects.
pub const SERVICE: &str = "10.99.0.1";
/// Its ports: HTTP/1, HTTP/2, opaque, bulk.
const SERVICE_PORTS: [u16; 4] = [80, 82, 81, 5201];
/// The ports of the servers, to which the outbound proxies connect.
pub const SERVER_PORTS: [u16; 4] = [8080, 8082, 8081, 5201];
const TABLES: [&str; 2] = ["tulle", "bench"];

/// Where the client sends its requests.
pub fn targets() -> Targets {
    Targets::on(SERVICE, SERVICE_PORTS)
}

/// Redirects what the client sends to the Service to these ports of the outbound proxy, and what arrives for the servers to
/// these of the inbound one.
pub fn install(testbed: &Testbed, outbound: [u16; 4], inbound: [u16; 4]) -> Result<()> {
    let client = rules("output", &format!("ip daddr {SERVICE}"), SERVICE_PORTS, outbound);
    let server = rules("prerouting", &format!("ip daddr {}", SERVER.1), SERVER_PORTS, inbound);
    for ((namespace, _), rules) in [(CLIENT, client), (SERVER, server)] {
        let path = testbed.folder.join(format!("{namespace}.nft"));
        fs::write(&path, rules)?;
        host::output(testbed.inside(namespace, "nft").arg("-f").arg(&path))?;
    }
    Ok(())
}

/// Removes all redirect rules.
pub fn clear() {
    for (namespace, _) in [CLIENT, SERVER] {
        for table in TABLES {
            let delete = ["netns", "exec", namespace, "nft", "delete", "table", "inet", table];
            let _ = host::output(Command::new("ip").args(delete));
        }
    }
}

fn rules(hook: &str, which: &str, from: [u16; 4], to: [u16; 4]) -> String {
    let ports: Vec<String> = from.iter().zip(to).map(|(from, to)| format!("{from} : {to}")).collect();
    format!(
        "table inet bench {{
  chain {hook} {{
    type nat hook {hook} priority -100;
    meta nfproto ipv4 {which} meta l4proto tcp redirect to : tcp dport map {{ {} }}
  }}
}}\n",
        ports.join(", ")
    )
}
