//! Answers of this sidecar's own that are no failures.

use super::Answer;
use crate::call::{Call, Ended};
use crate::http1::Head;

impl Call<'_> {
    /// Answers the request with this head and no body. What the client still sends of its own body is not read: its
    /// connection is closed unless there is nothing of it.
    pub async fn reply(&mut self, head: &Head) -> Ended {
        let reusable = self.body.is_ended() && self.head.keep_alive && !self.head.upgrade;
        let sent = match self.answer.head_with(head, true, !reusable) {
            Ok(()) => self.answer.flush().await,
            refused => refused,
        };
        Ended {
            result: Ok(head.status()),
            grpc_status: None,
            sidecar_reason: None,
            bytes: (0, 0),
            answered: true,
            client_reusable: reusable && sent.is_ok() && !matches!(self.answer, Answer::Mesh(..)),
        }
    }
}
