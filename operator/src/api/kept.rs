//! Answers of the API server that hold for a while. Bounded, and no clock inside.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Answers that are kept.
const MOST: usize = 1024;

/// Answers by the digest of what was asked.
pub struct Kept<T>(HashMap<Box<[u8]>, Answer<T>>);

struct Answer<T> {
    until: Instant,
    answer: T,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Clone> Kept<T> {
    /// The answer to a question, while it holds.
    pub fn get(&self, asked: &[u8], now: Instant) -> Option<T> {
        self.0.get(asked).filter(|kept| now < kept.until).map(|kept| kept.answer.clone())
    }

    /// Keeps an answer. Where there are too many, those that no longer hold are removed, then the one that ends first.
    pub fn keep(&mut self, asked: Box<[u8]>, answer: T, holds: Duration, now: Instant) {
        if self.0.len() >= MOST {
            self.0.retain(|_, kept| now < kept.until);
        }
        if self.0.len() >= MOST {
            let first = self.0.iter().min_by_key(|(_, kept)| kept.until);
            if let Some(first) = first.map(|(asked, _)| asked.clone()) {
                self.0.remove(&first);
            }
        }
        self.0.insert(asked, Answer { until: now + holds, answer });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_for_its_time() {
        let (mut kept, start) = (Kept::default(), Instant::now());
        kept.keep(Box::from(*b"good"), true, Duration::from_secs(60), start);
        kept.keep(Box::from(*b"bad"), false, Duration::from_secs(10), start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(kept.get(b"good", at(59)), Some(true));
        assert_eq!(kept.get(b"good", at(60)), None);
        assert_eq!(kept.get(b"bad", at(9)), Some(false));
        assert_eq!(kept.get(b"bad", at(10)), None);
        assert_eq!(kept.get(b"other", at(0)), None);
    }

    #[test]
    fn questions_without_end_do_not_fill_the_memory() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        kept.keep(Box::from(*b"good"), true, Duration::from_secs(60), now);
        for number in 0..2 * MOST {
            kept.keep(Box::from(number.to_be_bytes()), false, Duration::from_secs(10), now);
        }
        assert_eq!(kept.0.len(), MOST);
        assert!(kept.get(b"good", now).is_some(), "what holds for less is removed first");
    }
}
