//! What breakers have ejected, by the Service: the sum over all workers, each of which has a breaker of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What is ejected of one Service.
#[derive(Debug, Default)]
pub struct BreakerGauge {
    /// In how many workers each endpoint is ejected.
    ejected: Mutex<BTreeMap<SocketAddr, u32>>,
    panicking: AtomicI64,
}

impl BreakerGauge {
    /// In one worker these endpoints are ejected no more, and these are now; in so many more workers all are used for
    /// want of others.
    pub fn change(&self, restored: &[SocketAddr], ejected: &[SocketAddr], panicking: i64) {
        let mut all = self.ejected.lock().unwrap_or_else(PoisonError::into_inner);
        for endpoint in restored {
            if let Some(workers) = all.get_mut(endpoint) {
                *workers = workers.saturating_sub(1);
            }
        }
        for endpoint in ejected {
            *all.entry(*endpoint).or_default() += 1;
        }
        all.retain(|_, workers| *workers > 0);
        self.panicking.fetch_add(panicking, Ordering::Relaxed);
    }

    /// Endpoints that are ejected, and workers that use them all the same.
    pub fn read(&self) -> (i64, i64) {
        let ejected = self.endpoints().into_iter().map(|(_, workers)| i64::from(workers)).sum();
        (ejected, self.panicking.load(Ordering::Relaxed))
    }

    /// The endpoints that are ejected, and in how many workers each is.
    pub fn endpoints(&self) -> Vec<(SocketAddr, u32)> {
        let all = self.ejected.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(endpoint, workers)| (*endpoint, *workers)).collect()
    }
}

/// The gauges of all Services of which something has ever been ejected and that are still in use.
#[derive(Debug, Default)]
pub struct Breakers(Mutex<BTreeMap<(String, String), Arc<BreakerGauge>>>);

impl Breakers {
    /// The gauge of a Service.
    pub fn of(&self, namespace: &str, service: &str) -> Arc<BreakerGauge> {
        let mut gauges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(gauges.entry((namespace.to_owned(), service.to_owned())).or_default())
    }

    /// The gauge of a Service of which something has been ejected.
    pub fn find(&self, namespace: &str, service: &str) -> Option<Arc<BreakerGauge>> {
        let gauges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.get(&(namespace.to_owned(), service.to_owned())).cloned()
    }

    /// Every gauge with its namespace and Service. Those that nobody holds any more are forgotten.
    pub fn all(&self) -> Vec<((String, String), Arc<BreakerGauge>)> {
        let mut gauges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.retain(|_, gauge| Arc::strong_count(gauge) > 1);
        gauges.iter().map(|(service, gauge)| (service.clone(), Arc::clone(gauge))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_the_sum_of_the_workers_and_goes_with_the_last_of_them() {
        let breakers = Breakers::default();
        let (one, other) = (breakers.of("shop", "web"), breakers.of("shop", "web"));
        let [a, b] = [1, 2].map(|last| SocketAddr::from(([10, 0, 0, last], 80)));
        one.change(&[], &[a, b], 1);
        other.change(&[], &[b], 0);
        one.change(&[a], &[], -1);
        let read: Vec<_> = breakers.all().iter().map(|(_, gauge)| gauge.read()).collect();
        assert_eq!(read, [(2, 0)]);
        assert_eq!(breakers.find("shop", "web").unwrap().endpoints(), [(b, 2)]);
        assert!(breakers.find("shop", "api").is_none());
        drop((one, other));
        assert!(breakers.all().is_empty());
    }
}
