//! Redirect rules: one nftables table `tulle` in the pod's network namespace, made in one transaction.
//!
//! Inbound TCP goes to the sidecar except for its own ports and skipped ones; outbound TCP does
//! except for the sidecar's user, loopback (which includes the pod's own address) and skipped ports.
//! UDP is never touched. [`Rules`] is what a node agent will use as well.
//!
//! With `--preserve-source-address`, the sidecar's connections to the application come from the clients' addresses
//! ([`crate::transparent`]), and what the application answers must come back to the sidecar instead of leaving the pod:
//!
//! ```text
//! sidecar ─ client:p → pod:port ─▶ lo ─▶ application     "zone", "source": the connection is marked
//! sidecar ◀─ lo ─ policy route ◀─ pod:port → client:p ─┘  "source": answers carry the mark, which routes to lo
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};

use nlink::netlink::nftables::{
    BaseChain, Chain, CmpOp, CtKey, Expr, Family, FibFlags, FibResult, FilterHook, MetaKey, NatHook,
    Priority, RawExpr, Register, Rule,
};
use nlink::netlink::route::{Ipv4Route, Ipv6Route};
use nlink::netlink::rule::RuleBuilder;
use nlink::netlink::types::route::RouteType;
use nlink::netlink::{Connection, Nftables, Route};
use rustix::process::geteuid;
use rustix::thread::{CapabilitySet, capabilities};
use tulle_mesh::ports;

/// The table's name.
const TABLE: &str = "tulle";
/// TCP, as in the header of IP.
const TCP: u8 = 6;
/// Kind of the addresses of this network namespace, from linux/rtnetlink.h.
const RTN_LOCAL: u32 = 2;
/// Mark of connections that carry a client's address, and number of the routing table and of the conntrack zone for
/// them. Nothing else in a pod uses it: it is the number of the sidecar's inbound port.
const PRESERVED: u16 = ports::INBOUND;
/// Where the policy rule stands among others: behind that of local addresses (0), before all others (32766).
const RULE_PRIORITY: u32 = 4_150;

/// What is redirected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Inbound ports that stay as they are.
    pub skip_inbound_ports: Vec<u16>,
    /// Outbound ports that stay as they are.
    pub skip_outbound_ports: Vec<u16>,
    /// The application sees its clients' addresses.
    pub preserve_source_address: bool,
}

impl Rules {
    /// Puts the rules in, in place of those of an earlier run.
    ///
    /// # Errors
    /// What the kernel refused. If a right is missing, the error names it.
    pub async fn apply(&self) -> anyhow::Result<()> {
        let explained = |error: anyhow::Error| {
            if !not_permitted(&error) {
                return error;
            }
            let has_net_admin =
                capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
            error.context(needed_rights(geteuid().as_raw(), has_net_admin))
        };
        self.install().await.map_err(explained)
    }

    async fn install(&self) -> anyhow::Result<()> {
        let connection = Connection::<Nftables>::new()?;
        connection.del_table_if_exists(TABLE, Family::Inet).await?;
        let mut transaction = connection.transaction().add_table(TABLE, Family::Inet);
        for (name, base) in self.chains() {
            transaction = transaction.add_chain(Chain::new(TABLE, name)?.family(Family::Inet).base(base));
        }
        for rule in self.rules() {
            transaction = transaction.add_rule(rule);
        }
        transaction.commit(&connection).await?;
        if self.preserve_source_address {
            route_preserved().await?;
        }
        Ok(())
    }

    fn chains(&self) -> Vec<(&'static str, BaseChain)> {
        let mut chains = vec![
            ("inbound", BaseChain::nat(NatHook::Prerouting, Priority::DstNat)),
            ("outbound", BaseChain::nat(NatHook::Output, Priority::DstNat)),
        ];
        if self.preserve_source_address {
            // Before and after connections are looked up (-200).
            chains.push(("zone", BaseChain::filter(FilterHook::Output, Priority::Raw)));
            chains.push(("source", BaseChain::route(Priority::Mangle)));
        }
        chains
    }

    fn rules(&self) -> Vec<Rule> {
        let mut rules = self.inbound();
        rules.extend(self.outbound());
        if self.preserve_source_address {
            rules.extend(preserved());
        }
        rules
    }

    fn inbound(&self) -> Vec<Rule> {
        let rule = || rule("inbound");
        let ours = [ports::INBOUND, ports::OUTBOUND, ports::ADMIN, ports::PROBES];
        let mut rules = vec![rule().match_iif("lo").accept()];
        rules.extend(
            ours.iter().chain(&self.skip_inbound_ports).map(|port| rule().match_tcp_dport(*port).accept()),
        );
        rules.push(rule().match_l4proto(TCP).redirect(Some(ports::INBOUND)));
        rules
    }

    fn outbound(&self) -> Vec<Rule> {
        let rule = || rule("outbound");
        let mut rules = vec![
            is(rule(), Expr::Meta { dreg: Register::R0, key: MetaKey::SkUid }, ports::PROXY_UID).accept(),
            rule().match_oif("lo").accept(),
        ];
        rules.extend(self.skip_outbound_ports.iter().map(|port| rule().match_tcp_dport(*port).accept()));
        rules.push(rule().match_l4proto(TCP).redirect(Some(ports::OUTBOUND)));
        rules
    }
}

fn rule(chain: &str) -> Rule {
    Rule::new(TABLE, chain).family(Family::Inet)
}

/// Matches packets of which `value`, loaded into register 0, is `expected`.
fn is(rule: Rule, value: Expr, expected: u32) -> Rule {
    rule.then(value).then(Expr::Cmp {
        sreg: Register::R0,
        op: CmpOp::Eq,
        data: expected.to_ne_bytes().to_vec(),
    })
}

/// What connections with a client's address need besides: `oif "lo" meta l4proto tcp fib saddr type != local` is theirs
/// alone, because only a transparent socket sends from an address that the pod does not have.
fn preserved() -> [Rule; 3] {
    let mark = || Expr::Immediate { dreg: Register::R0, data: u32::from(PRESERVED).to_ne_bytes().to_vec() };
    let from_client = |chain| {
        rule(chain)
            .match_oif("lo")
            .match_l4proto(TCP)
            .then(Expr::Fib { dreg: Register::R0, result: FibResult::AddrType, flags: FibFlags::SADDR })
            .then(Expr::Cmp { sreg: Register::R0, op: CmpOp::Neq, data: RTN_LOCAL.to_ne_bytes().to_vec() })
    };
    // The client may have a connection from the same port to the same port of the pod, which the kernel has redirected
    // to the sidecar. In a zone of its own, this one is not taken for a part of it. Only its way there: answers are
    // looked up without a zone.
    let zone = from_client("zone")
        .then(Expr::Immediate { dreg: Register::R0, data: PRESERVED.to_ne_bytes().to_vec() })
        .then(Expr::from(original_zone()));
    let sent = from_client("source")
        .then(mark())
        .then(Expr::CtSet { key: CtKey::Mark, sreg: Register::R0 })
        .accept();
    let answers = is(rule("source"), Expr::Ct { dreg: Register::R0, key: CtKey::Mark }, u32::from(PRESERVED))
        .then(mark())
        .then(Expr::MetaSet { key: MetaKey::Mark, sreg: Register::R0 });
    [zone, sent, answers]
}

/// `ct original zone set` what register 0 holds: a statement that the library has for both directions only.
fn original_zone() -> RawExpr {
    // From linux/netfilter/nf_tables.h. Attributes have a length and a kind in this machine's byte order, and end at
    // a multiple of four bytes; numbers in nftables are big-endian.
    const NFTA_CT_KEY: u16 = 2;
    const NFTA_CT_DIRECTION: u16 = 3;
    const NFTA_CT_SREG: u16 = 4;
    const NFT_CT_ZONE: u32 = 17;
    const IP_CT_DIR_ORIGINAL: u8 = 0;
    let attributes: [(u16, u16, [u8; 4]); 3] = [
        (8, NFTA_CT_SREG, Register::R0.wire().to_be_bytes()),
        (8, NFTA_CT_KEY, NFT_CT_ZONE.to_be_bytes()),
        (5, NFTA_CT_DIRECTION, [IP_CT_DIR_ORIGINAL, 0, 0, 0]),
    ];
    let bytes = attributes.into_iter().flat_map(|(length, kind, value)| {
        let header = length.to_ne_bytes().into_iter().chain(kind.to_ne_bytes());
        header.chain(value)
    });
    RawExpr::new("ct", bytes.collect())
}

/// Routes what is marked to the pod itself, for both families.
async fn route_preserved() -> anyhow::Result<()> {
    let (mark, table) = (u32::from(PRESERVED), u32::from(PRESERVED));
    let connection = Connection::<Route>::new()?;
    let rule = |builder: RuleBuilder| builder.priority(RULE_PRIORITY).fwmark(mark).table(table);
    let everything = Ipv4Route::new(Ipv4Addr::UNSPECIFIED, 0);
    connection.del_rule_if_exists(rule(RuleBuilder::v4())).await?;
    connection.add_rule(rule(RuleBuilder::v4())).await?;
    connection.replace_route(everything.dev("lo").route_type(RouteType::Local).table(table)).await?;
    if has_ipv6() {
        let everything = Ipv6Route::new(Ipv6Addr::UNSPECIFIED, 0);
        connection.del_rule_if_exists(rule(RuleBuilder::v6())).await?;
        connection.add_rule(rule(RuleBuilder::v6())).await?;
        connection.replace_route(everything.dev("lo").route_type(RouteType::Local).table(table)).await?;
    }
    Ok(())
}

/// Whether the kernel refused something for want of a right.
fn not_permitted(error: &anyhow::Error) -> bool {
    error.downcast_ref::<nlink::Error>().is_some_and(nlink::Error::is_permission_denied)
}

/// What the init container needs, what it has, and what to do about the difference.
fn needed_rights(uid: u32, has_net_admin: bool) -> String {
    let has = if has_net_admin { "the capability" } else { "not the capability" };
    format!(
        "not allowed to set the redirect rules: container tulle-init needs uid 0 and the capability NET_ADMIN, and has uid {uid} and {has}; if an admission webhook or policy hardens all containers (runAsUser, capabilities), exclude tulle-init and tulle-proxy there, otherwise the node forbids it"
    )
}

/// Whether this network namespace has any IPv6 address.
fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/self/net/if_inet6").is_ok_and(|addresses| !addresses.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preserving() -> Rules {
        Rules { preserve_source_address: true, ..Rules::default() }
    }

    #[test]
    fn nothing_of_the_source_address_is_set_up_unless_it_is_asked_for() {
        let (plain, preserving) = (Rules::default(), preserving());
        let names = |rules: &Rules| rules.chains().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&plain), ["inbound", "outbound"]);
        assert_eq!(names(&preserving), ["inbound", "outbound", "zone", "source"]);
        let before = plain.rules();
        let after = preserving.rules();
        assert_eq!(after[..before.len()], before, "redirection is the same");
        assert_eq!(after.len(), before.len() + 3);
    }

    #[test]
    fn a_container_without_its_rights_is_told_what_it_lacks_and_others_are_not() {
        let denied = nlink::Error::from_errno(rustix::io::Errno::PERM.raw_os_error());
        assert!(not_permitted(&denied.into()));
        let invalid = nlink::Error::from_errno(rustix::io::Errno::INVAL.raw_os_error());
        assert!(!not_permitted(&invalid.into()));
        assert!(!not_permitted(&anyhow::anyhow!("of something else")));
        let hardened = needed_rights(1000, false);
        assert!(hardened.contains("has uid 1000 and not the capability"), "{hardened}");
        assert!(hardened.contains("exclude tulle-init") && !hardened.contains('\n'), "{hardened}");
        assert!(needed_rights(0, true).contains("has uid 0 and the capability"));
    }

    #[test]
    fn connections_are_looked_up_between_the_two_chains_and_packets_are_routed_after_the_second() {
        let chains = preserving().chains();
        let priority = |index: usize| chains[index].1.priority().to_i32();
        assert!(priority(2) < -200 && -200 < priority(3));
        assert_eq!(chains[3].1.chain_type().as_str(), "route");
    }

    #[test]
    fn the_zone_is_that_of_the_way_to_the_application_only() {
        let data = original_zone().data.unwrap();
        // As `nft --debug=netlink` sends it: NFTA_CT_SREG 1, NFTA_CT_KEY 17 (zone), NFTA_CT_DIRECTION 0 (original).
        let attribute = |length: u16, kind: u16, value: [u8; 4]| {
            [length.to_ne_bytes().as_slice(), kind.to_ne_bytes().as_slice(), value.as_slice()].concat()
        };
        let wanted =
            [attribute(8, 4, [0, 0, 0, 1]), attribute(8, 2, [0, 0, 0, 17]), attribute(5, 3, [0, 0, 0, 0])];
        assert_eq!(data, wanted.concat());
    }

    #[test]
    fn only_what_the_pod_does_not_have_counts_as_a_clients_address() {
        for rule in &preserved()[..2] {
            let text = format!("{:?}", rule.spec());
            assert!(
                text.contains("AddrType") && text.contains("Neq") && text.contains("[2, 0, 0, 0]"),
                "{text}"
            );
        }
    }
}
