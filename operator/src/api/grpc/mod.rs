//! The query API over gRPC: service `tulle.v1.Query` of `mesh/proto/tulle/v1/query.proto`, on the port of the JSON.
//!
//! In: messages, which become the parameters of the path that answers the same. Out: what the function of that path
//! (`handlers`) answers, as a message. So checks, rights, turns and limits are those of the JSON; nothing is
//! looked up here. There is no server reflection: clients need the description.
//!
//! ```text
//!   convert  requests to parameters, answers to messages
//!   proto    messages and the service, generated
//! ```

mod convert;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::response::Response;
use prost::Message;
use tonic::{Code, Status};

use super::{Api, Caller, MAX_BODY, MAX_QUERY, Parameters, Refused, handlers};
use proto::query_server::{Query, QueryServer, SERVICE_NAME};

/// Messages and the service, generated from `mesh/proto/tulle/v1/query.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("tulle.v1");
}

/// The longest message of a status, in bytes. It quotes what was asked for and travels as a header, in which a byte takes
/// up to three: clients take headers of 16 KiB, or of 8.
const MAX_MESSAGE: usize = 2560;

/// The routes of the service. Not as tonic's `Routes`, whose fallback would answer every unknown path of the page.
pub(super) fn routes(api: Api) -> Router {
    let service = QueryServer::new(Queries { api }).max_decoding_message_size(MAX_BODY);
    Router::new().route_service(&format!("/{SERVICE_NAME}/{{*method}}"), service)
}

/// Whether a path is one of the service.
pub(super) fn has_path(path: &str) -> bool {
    let path = path.strip_prefix('/').and_then(|path| path.strip_prefix(SERVICE_NAME));
    path.is_some_and(|method| method.starts_with('/'))
}

/// A request that was refused before it came here, as a status.
pub(super) fn refused(refused: Refused) -> Response {
    Status::from(refused).into_http()
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let code = match refused.status {
            StatusCode::UNAUTHORIZED => Code::Unauthenticated,
            StatusCode::FORBIDDEN => Code::PermissionDenied,
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::METHOD_NOT_ALLOWED => Code::Unimplemented,
            StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
            StatusCode::INTERNAL_SERVER_ERROR => Code::Internal,
            StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
            status if status.is_client_error() => Code::InvalidArgument,
            _ => Code::Unknown,
        };
        let mut message = match refused.refusal.hint {
            Some(hint) => format!("{}. hint: {hint}", refused.refusal.error),
            None => refused.refusal.error,
        };
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        Self::new(code, message)
    }
}

/// What a method returns.
type Reply<T> = Result<tonic::Response<T>, Status>;

/// The service.
struct Queries {
    api: Api,
}

impl Queries {
    /// Who asks: what was found out before the request came here.
    async fn caller<A>(&self, request: &tonic::Request<A>) -> Result<Arc<Caller>, Refused> {
        match request.extensions().get::<Arc<Caller>>() {
            Some(caller) => Ok(Arc::clone(caller)),
            None => self.api.authenticator.caller(request.metadata().as_ref()).await,
        }
    }

    /// Answers a request by the function of the path that answers the same as JSON.
    async fn answer<A, T, R, F>(
        &self,
        request: tonic::Request<A>,
        handler: impl FnOnce(Api, Arc<Caller>, Parameters) -> F,
    ) -> Reply<R>
    where
        A: Message + Into<Parameters>,
        F: Future<Output = Result<T, Refused>>,
        R: From<T>,
    {
        // As long as the same parameters may be in a URL.
        if request.get_ref().encoded_len() > MAX_QUERY {
            let error = format!("the request is longer than {MAX_QUERY} bytes");
            return Err(Refused::bad_request(error).into());
        }
        let caller = self.caller(&request).await?;
        let answer = handler(self.api.clone(), caller, request.into_inner().into()).await?;
        Ok(tonic::Response::new(answer.into()))
    }
}

#[tonic::async_trait]
impl Query for Queries {
    async fn stat(&self, request: tonic::Request<proto::StatRequest>) -> Reply<proto::StatReply> {
        self.answer(request, handlers::stat).await
    }

    async fn edges(&self, request: tonic::Request<proto::EdgesRequest>) -> Reply<proto::EdgesReply> {
        self.answer(request, handlers::edges).await
    }

    async fn routes(&self, request: tonic::Request<proto::RoutesRequest>) -> Reply<proto::RoutesReply> {
        self.answer(request, handlers::routes).await
    }

    async fn timeline(&self, request: tonic::Request<proto::TimelineRequest>) -> Reply<proto::TimelineReply> {
        self.answer(request, handlers::timeline).await
    }

    async fn sidecars(&self, request: tonic::Request<proto::SidecarsRequest>) -> Reply<proto::SidecarsReply> {
        self.answer(request, handlers::sidecars).await
    }

    async fn health(&self, request: tonic::Request<proto::HealthRequest>) -> Reply<proto::HealthReply> {
        self.answer(request, handlers::health).await
    }

    async fn explain(&self, request: tonic::Request<proto::ExplainRequest>) -> Reply<proto::ExplainReply> {
        self.answer(request, handlers::explain).await
    }

    async fn access(&self, request: tonic::Request<proto::AccessRequest>) -> Reply<proto::AccessReply> {
        self.answer(request, handlers::access).await
    }

    async fn denials(&self, request: tonic::Request<proto::DenialsRequest>) -> Reply<proto::DenialsReply> {
        self.answer(request, handlers::denials).await
    }

    async fn evidence(&self, request: tonic::Request<proto::EvidenceRequest>) -> Reply<proto::EvidenceReply> {
        self.answer(request, handlers::evidence).await
    }

    async fn diff(&self, request: tonic::Request<proto::DiffRequest>) -> Reply<proto::DiffReply> {
        let caller = self.caller(&request).await?;
        let proto::DiffRequest { policy, window } = request.into_inner();
        let parameters = Parameters::of([("window", window.map(|seconds| seconds.to_string()))]);
        let diff = handlers::diff_of(self.api.clone(), caller, parameters, policy.as_bytes()).await?;
        Ok(tonic::Response::new(diff.into()))
    }
}
