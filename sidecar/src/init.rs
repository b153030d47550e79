//! Redirect rules: one nftables table `tulle` in the pod's network namespace, made in one transaction.
//!
//! Inbound TCP goes to the sidecar except for its own ports and skipped ones; outbound TCP does
//! except for the sidecar's user, loopback (which includes the pod's own address) and skipped ports.
//! UDP is never touched. [`Rules`] is what a node agent will use as well.

use nlink::netlink::nftables::{
    BaseChain, Chain, CmpOp, Expr, Family, MetaKey, NatHook, Priority, Register, Rule,
};
use nlink::netlink::{Connection, Nftables};
use tulle_mesh::ports;

/// The table's name.
const TABLE: &str = "tulle";

/// What is redirected.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Rules {
    /// Inbound ports that stay as they are.
    #[arg(long, value_delimiter = ',')]
    pub skip_inbound_ports: Vec<u16>,
    /// Outbound ports that stay as they are.
    #[arg(long, value_delimiter = ',')]
    pub skip_outbound_ports: Vec<u16>,
}

impl Rules {
    /// Puts the rules in, in place of those of an earlier run.
    ///
    /// # Errors
    /// What the kernel refused; usually the capability NET_ADMIN is missing.
    pub async fn apply(&self) -> anyhow::Result<()> {
        let connection = Connection::<Nftables>::new()?;
        connection.del_table_if_exists(TABLE, Family::Inet).await?;
        let chain = |name, hook| {
            let base = BaseChain::nat(hook, Priority::DstNat);
            Chain::new(TABLE, name).map(|chain| chain.family(Family::Inet).base(base))
        };
        let mut transaction = connection
            .transaction()
            .add_table(TABLE, Family::Inet)
            .add_chain(chain("inbound", NatHook::Prerouting)?)
            .add_chain(chain("outbound", NatHook::Output)?);
        for rule in self.inbound().into_iter().chain(self.outbound()) {
            transaction = transaction.add_rule(rule);
        }
        transaction.commit(&connection).await?;
        Ok(())
    }

    fn inbound(&self) -> Vec<Rule> {
        let rule = || Rule::new(TABLE, "inbound").family(Family::Inet);
        let ours = [ports::INBOUND, ports::OUTBOUND, ports::ADMIN, ports::PROBES];
        let mut rules = vec![rule().match_iif("lo").accept()];
        rules.extend(
            ours.iter().chain(&self.skip_inbound_ports).map(|port| rule().match_tcp_dport(*port).accept()),
        );
        rules.push(rule().match_l4proto(6).redirect(Some(ports::INBOUND)));
        rules
    }

    fn outbound(&self) -> Vec<Rule> {
        let rule = || Rule::new(TABLE, "outbound").family(Family::Inet);
        let mut rules = vec![
            rule()
                .then(Expr::Meta { dreg: Register::R0, key: MetaKey::SkUid })
                .then(Expr::Cmp {
                    sreg: Register::R0,
                    op: CmpOp::Eq,
                    data: ports::PROXY_UID.to_ne_bytes().to_vec(),
                })
                .accept(),
            rule().match_oif("lo").accept(),
        ];
        rules.extend(self.skip_outbound_ports.iter().map(|port| rule().match_tcp_dport(*port).accept()));
        rules.push(rule().match_l4proto(6).redirect(Some(ports::OUTBOUND)));
        rules
    }
}
