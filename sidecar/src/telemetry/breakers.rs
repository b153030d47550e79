//! What breakers have ejected, by the Service: the sum over all workers, each of which has a breaker of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What is ejected of one Service.
#[derive(Debug, Default)]
pub struct BreakerGauge {
    ejected: AtomicI64,
    panicking: AtomicI64,
}

impl BreakerGauge {
    /// So many more endpoints are ejected, and in so many more workers all are used for want of others.
    pub fn change(&self, ejected: i64, panicking: i64) {
        self.ejected.fetch_add(ejected, Ordering::Relaxed);
        self.panicking.fetch_add(panicking, Ordering::Relaxed);
    }

    /// Endpoints that are ejected, and workers that use them all the same.
    pub fn read(&self) -> (i64, i64) {
        (self.ejected.load(Ordering::Relaxed), self.panicking.load(Ordering::Relaxed))
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
        one.change(2, 1);
        other.change(1, 0);
        one.change(-1, -1);
        let read: Vec<_> = breakers.all().iter().map(|(_, gauge)| gauge.read()).collect();
        assert_eq!(read, [(2, 0)]);
        drop((one, other));
        assert!(breakers.all().is_empty());
    }
}
