//! Which hosts are reached without the proxy of the environment, as kubectl decides it.
//!
//! kube takes the proxy of HTTPS_PROXY and leaves NO_PROXY to its user.

use std::net::IpAddr;

/// Whether the host is reached directly: it is this machine, or NO_PROXY lists it.
///
/// Entries are `*`, addresses, networks like `10.0.0.0/8`, and domains with all that end in them.
pub fn bypasses(host: &str, no_proxy: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    let address = host.parse::<IpAddr>().ok();
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    no_proxy.split(',').map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| match address {
        _ if entry == "*" => true,
        Some(address) => entry.parse::<IpAddr>() == Ok(address) || contains(entry, address),
        None => is_domain_of(&entry.to_ascii_lowercase(), &host),
    })
}

fn is_domain_of(entry: &str, host: &str) -> bool {
    let domain = entry.trim_start_matches('*').trim_start_matches('.');
    match host.strip_suffix(domain) {
        Some("") => !entry.starts_with(['.', '*']),
        Some(before) => before.ends_with('.'),
        None => false,
    }
}

/// Whether a network in CIDR notation contains the address.
fn contains(network: &str, address: IpAddr) -> bool {
    let Some((base, length)) = network.split_once('/') else { return false };
    let (Ok(base), Ok(length)) = (base.parse::<IpAddr>(), length.parse::<u32>()) else { return false };
    let (base, address, bits) = match (base, address) {
        (IpAddr::V4(base), IpAddr::V4(address)) => {
            (u128::from(base.to_bits()), u128::from(address.to_bits()), 32)
        }
        (IpAddr::V6(base), IpAddr::V6(address)) => (base.to_bits(), address.to_bits(), 128),
        _ => return false,
    };
    let rest: u32 = if length <= bits { bits - length } else { return false };
    base.checked_shr(rest).unwrap_or(0) == address.checked_shr(rest).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_reached_directly() {
        for host in ["localhost", "127.0.0.1", "127.8.0.1", "[::1]", "::1"] {
            assert!(bypasses(host, ""), "{host}");
        }
        assert!(!bypasses("k8s.example", ""));
        assert!(!bypasses("10.0.0.1", ""));
    }

    #[test]
    fn no_proxy_lists_domains_addresses_and_networks() {
        assert!(bypasses("k8s.example", "other.example, Example"));
        assert!(bypasses("k8s.example", "k8s.example"));
        assert!(bypasses("k8s.example", ".example"));
        assert!(bypasses("k8s.example", "*.example"));
        assert!(bypasses("10.1.2.3", "10.0.0.0/8"));
        assert!(bypasses("10.1.2.3", "10.1.2.3"));
        assert!(bypasses("10.1.2.3", "0.0.0.0/0"));
        assert!(bypasses("fd00::1", "fd00::/8"));
        assert!(bypasses("anything.example", "*"));
    }

    #[test]
    fn what_no_proxy_does_not_list_goes_through_the_proxy() {
        assert!(!bypasses("k8s.example", "s.example"), "a domain ends at a dot");
        assert!(!bypasses("example", ".example"), "a leading dot means what is below");
        assert!(!bypasses("11.1.2.3", "10.0.0.0/8,fd00::/8,10.0.0.0/40"));
        assert!(!bypasses("fd00::1", "10.0.0.0/8"));
    }
}
