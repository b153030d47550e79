//! Requests of clients that no policy can name by their service account. A suggested policy leaves them out, so that its
//! reader must know of them before it is enforced.

use std::collections::{BTreeSet, HashMap};

use tulle_mesh::query::{Party, Unidentified};
use tulle_mesh::reason::Reason;

use super::{Counted, admitted, is_named};
use crate::model::{Key, Model};
use crate::telemetry::history::{Counts, Direction, Sum};

/// Senders that are named of each workload at most.
const MOST_SENDERS: usize = 20;

/// What a workload got from clients without an identity. `None`: nothing. Its senders are found by [`name_senders`].
pub(super) fn of(counted: &[Counted<'_>], party: &Party) -> Option<Unidentified> {
    let (mut plain, mut merged) = (0_u64, 0_u64);
    for (id, counts) in counted.iter().filter(|(id, _)| !is_named(id)) {
        let sum = if id.mtls { &mut merged } else { &mut plain };
        *sum = sum.saturating_add(admitted(counts));
    }
    let is_any = plain > 0 || merged > 0;
    is_any.then(|| Unidentified { destination: party.clone(), plain, merged, senders: Vec::new() })
}

/// Adds the workloads with a sidecar that have sent plain text to Services in front of these workloads.
pub(super) fn name_senders(model: &Model, counted: &Sum, found: &mut [Unidentified]) {
    if found.iter().all(|one| one.plain == 0) {
        return;
    }
    let mut senders: HashMap<Key, BTreeSet<Party>> = HashMap::new();
    for (id, counts) in &counted.series {
        if id.direction == Direction::Outbound && !id.mtls && sent(counts) > 0 {
            let service = (id.namespace.clone(), id.peer.clone());
            senders.entry(service).or_default().insert(id.reporter.party());
        }
    }
    let mut behind: HashMap<Party, BTreeSet<&Party>> = HashMap::new();
    for (service, parties) in &senders {
        let workloads: BTreeSet<Party> = model.pods_behind(service).map(|pod| pod.party()).collect();
        for workload in workloads {
            behind.entry(workload).or_default().extend(parties);
        }
    }
    for one in found.iter_mut().filter(|one| one.plain > 0) {
        let senders = behind.get(&one.destination).into_iter().flatten();
        one.senders = senders.take(MOST_SENDERS).map(|party| (*party).clone()).collect();
    }
}

/// Requests and connections of an outbound series that an endpoint may have got. A sidecar counts those that went to none
/// as without mTLS, because no endpoint says whether it would have secured them.
fn sent(counts: &Counts) -> u64 {
    let never = |name: &str| Reason::from_name(name).is_some_and(was_never_sent);
    let unsent = counts.reasons.iter().filter(|(name, _)| never(name));
    admitted(counts).saturating_sub(unsent.map(|(_, count)| count).sum())
}

/// Whether no endpoint got anything of a request that failed for this reason.
fn was_never_sent(reason: Reason) -> bool {
    use Reason::{
        ClientBadRequest, ClientHeadTooLong, FaultInjected, OursNoCertificate, OursResources,
        RouteHeadTooLong, UpstreamConnect,
    };
    reason.has_no_endpoint()
        || matches!(
            reason,
            ClientBadRequest
                | ClientHeadTooLong
                | FaultInjected
                | OursNoCertificate
                | OursResources
                | RouteHeadTooLong
                | UpstreamConnect
        )
}
