//! What one caller may take of the operator: a few requests at a time, so that the others get theirs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;

use super::Refused;

/// Requests of a user that are answered or wait at a time.
const OF_A_USER: usize = 4;

/// Requests by the name of their user.
#[derive(Default)]
pub struct Running(Mutex<HashMap<String, usize>>);

/// A request that counts until this is dropped.
pub struct Request {
    running: Arc<Running>,
    user: String,
}

impl Running {
    /// Counts a request.
    ///
    /// # Errors
    /// 429 where the user has too many.
    pub fn begin(self: &Arc<Self>, user: &str) -> Result<Request, Refused> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = running.entry(user.to_owned()).or_default();
        if *count >= OF_A_USER {
            return Err(Refused::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{user} has {OF_A_USER} requests that are not answered yet"),
            )
            .with_hint("wait for their answers, and try again"));
        }
        *count += 1;
        Ok(Request { running: Arc::clone(self), user: user.to_owned() })
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let mut running = self.running.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = running.get_mut(&self.user) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                running.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_with_many_requests_takes_nothing_from_another() {
        let running = Arc::new(Running::default());
        let greedy: Vec<Request> = (0..OF_A_USER).filter_map(|_| running.begin("greedy").ok()).collect();
        assert_eq!(greedy.len(), OF_A_USER);
        let refused = running.begin("greedy").err().unwrap();
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(refused.refusal.hint.is_some());
        assert!(running.begin("modest").is_ok());
        drop(greedy);
        assert!(running.begin("greedy").is_ok(), "its requests have ended");
        assert!(running.0.lock().unwrap().is_empty(), "nobody is remembered without requests");
    }
}
