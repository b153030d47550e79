//! The cluster: the kubeconfig, the API server, and the operator behind a port-forward.
//!
//! [`Context`] is what every command gets. It connects when a command first needs the cluster, so that those which read
//! files only run without one.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::OnceCell;
use tulle_mesh::query;

use crate::args::Global;
use crate::exit::{self, CliError};
use crate::manifests::NAMESPACE;
use crate::output::{Output, coloured};

pub mod connection;
pub mod failure;
pub mod forward;
pub mod locate;
pub mod operator;
pub mod proxy;

pub use locate::{Located, Ready};
pub use operator::Operator;

use connection::Connection;

/// How long a request of the API server or of the operator may take.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// How long the API server may be silent in an answer.
pub const READ_TIMEOUT: Duration = Duration::from_secs(15);
/// The service account of every namespace, whose token shows that namespace.
const ACCOUNT: &str = "default";
/// The least that the API server grants: no command needs more but those that stay open.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// The namespaces that a command looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespaces {
    /// This one.
    One(String),
    /// All namespaces.
    All,
}

/// What every command gets.
pub struct Context {
    /// From `-n`, `-A` and the kubeconfig.
    pub namespace: Namespaces,
    /// The namespace of Tulle: from `--system-namespace`, or [`NAMESPACE`]. [`Context::locate`] says where it really is.
    pub system: String,
    /// How to print.
    pub output: Output,
    /// Whether the user has named the namespace of Tulle.
    system_is_given: bool,
    connection: Connection,
    client: OnceCell<Client>,
    streams: OnceCell<Client>,
}

impl Context {
    /// Reads the kubeconfig. What is wrong with it is reported by [`Context::client`].
    pub fn new(global: &Global) -> Self {
        let connection = Connection::read(global);
        let namespace = match (&global.namespace, global.all_namespaces) {
            (_, true) => Namespaces::All,
            (Some(namespace), false) => Namespaces::One(namespace.clone()),
            (None, false) => Namespaces::One(connection.namespace()),
        };
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
        let (no_color, term) = (std::env::var_os("NO_COLOR"), std::env::var_os("TERM"));
        let output = Output {
            format: global.output,
            terminal,
            headers: !global.no_headers,
            colour: coloured(global.no_color, no_color.as_deref(), term.as_deref(), terminal),
        };
        Self {
            namespace,
            system: global.system_namespace.clone().unwrap_or_else(|| NAMESPACE.to_owned()),
            output,
            system_is_given: global.system_namespace.is_some(),
            connection,
            client: OnceCell::new(),
            streams: OnceCell::new(),
        }
    }

    /// The namespace of Tulle, if the user has named it.
    pub fn given_system(&self) -> Option<&str> {
        self.system_is_given.then_some(self.system.as_str())
    }

    /// The namespace, if the command looks at one.
    pub fn namespace(&self) -> Option<&str> {
        match &self.namespace {
            Namespaces::One(namespace) => Some(namespace),
            Namespaces::All => None,
        }
    }

    /// The client of the API server. A connection that gets no byte for [`READ_TIMEOUT`] breaks.
    ///
    /// # Errors
    /// No kubeconfig was found, or it is invalid.
    pub async fn client(&self) -> Result<Client, CliError> {
        self.client.get_or_try_init(|| self.connection.client(Some(READ_TIMEOUT))).await.cloned()
    }

    /// A client for what may be silent for long: watches and port-forwards.
    ///
    /// # Errors
    /// As [`Context::client`].
    pub async fn streams(&self) -> Result<Client, CliError> {
        self.streams.get_or_try_init(|| self.connection.client(None)).await.cloned()
    }

    /// Finds a replica of the operator: the one that leads, as far as the Lease may be read.
    ///
    /// # Errors
    /// As [`Context::replicas`].
    pub async fn locate(&self) -> Result<Located, CliError> {
        Ok(self.replicas().await?.first)
    }

    /// Finds every replica of the operator that is ready; or every one, if none is.
    ///
    /// # Errors
    /// Tulle is not installed, the operator has no pod, or the user may not look.
    pub async fn replicas(&self) -> Result<Ready, CliError> {
        let client = self.client().await?;
        within("looking for the operator", locate::ready(&client, &self.system, self.system_is_given)).await
    }

    /// The operator's query API, with a token for the namespaces of this command.
    ///
    /// # Errors
    /// As [`Context::replicas`], [`Context::token`] and [`Context::leader`].
    pub async fn operator(&self) -> Result<Operator, CliError> {
        let found = self.replicas().await?;
        let token = self.token(&found.first, TOKEN_LIFETIME).await?;
        let located = self.leader(found, &token).await?;
        if let Some(note) = located.note() {
            exit::note(&note);
        }
        Ok(Operator::new(self.streams().await?, located, token))
    }

    /// The replica to ask: the one that leads. Where the Lease does not say it of one that is ready, each says it of itself,
    /// and one that answers is better than none.
    ///
    /// # Errors
    /// No replica answers.
    pub async fn leader(&self, found: Ready, token: &str) -> Result<Located, CliError> {
        if found.first.is_certain() {
            return Ok(found.first);
        }
        let client = self.streams().await?;
        let system = found.first.namespace.clone();
        let ask = |at: Located| {
            let operator = Operator::new(client.clone(), at, token.to_owned());
            async move {
                let health = operator.get::<query::Health>(query::Paths::HEALTH, &[]).await;
                (operator.at().clone(), health.map(|health| health.leader))
            }
        };
        let mut asked: FuturesUnordered<_> = found.into_all().into_iter().map(ask).collect();
        let mut answers = locate::Answers::default();
        while let Some((at, leads)) = asked.next().await {
            if let Some(leader) = answers.take(at, leads) {
                return Ok(leader);
            }
        }
        answers.end(&system)
    }

    /// A token that the operator takes for the namespaces of this command.
    ///
    /// # Errors
    /// The user may not request it, or the service account does not exist.
    pub async fn token(&self, located: &Located, lifetime: Duration) -> Result<String, CliError> {
        let (namespace, account) = match &self.namespace {
            Namespaces::One(namespace) => (namespace.as_str(), ACCOUNT),
            Namespaces::All => (located.namespace.as_str(), query::VIEWER),
        };
        let accounts = Api::<ServiceAccount>::namespaced(self.client().await?, namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![query::AUDIENCE.to_owned()],
                expiration_seconds: i64::try_from(lifetime.as_secs()).ok(),
                ..TokenRequestSpec::default()
            },
            ..TokenRequest::default()
        };
        let answer = within("requesting a token", async {
            let parameters = PostParams::default();
            let asked = accounts.create_token_request(account, &parameters, &request).await;
            asked.map_err(|error| failure::of_token(&error, namespace, account))
        });
        let status = answer.await?.status;
        let token = status.map(|status| status.token);
        token.ok_or_else(|| {
            CliError::failed(format!("the API server issued no token for {namespace}/{account}"))
        })
    }
}

/// Waits for requests of the cluster for [`TIMEOUT`] at most. `doing` says what is tried.
///
/// # Errors
/// That of the requests, or that they got no answer.
pub async fn within<T>(
    doing: &str,
    requests: impl Future<Output = Result<T, CliError>>,
) -> Result<T, CliError> {
    match tokio::time::timeout(TIMEOUT, requests).await {
        Ok(answer) => answer,
        Err(_) => {
            let what = format!("{doing} got no answer within {} s", TIMEOUT.as_secs());
            Err(CliError::failed(what)
                .hint("`kubectl get --raw /readyz` shows whether the API server answers"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_namespaces_wins_over_one_as_in_kubectl() {
        let global = |namespace: Option<&str>, all_namespaces| Global {
            namespace: namespace.map(str::to_owned),
            all_namespaces,
            kubeconfig: Some("/does/not/exist".into()),
            ..Global::default()
        };
        assert_eq!(Context::new(&global(Some("shop"), false)).namespace(), Some("shop"));
        assert_eq!(Context::new(&global(Some("shop"), true)).namespace, Namespaces::All);
        assert_eq!(Context::new(&global(None, false)).namespace(), Some("default"));
    }

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_read_fails_only_commands_that_need_the_cluster() {
        let global = Global { kubeconfig: Some("/does/not/exist".into()), ..Global::default() };
        let context = Context::new(&global);
        let error = context.client().await.err().unwrap();
        assert_eq!(error.code(), 1);
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
    }
}
