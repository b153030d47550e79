//! From the kubeconfig to a client of the API server.
//!
//! Without a kubeconfig, a program in a pod uses the pod's service account, as kubectl does.

use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::{TIMEOUT, proxy};
use crate::args::Global;
use crate::exit::CliError;

/// How to reach the API server.
pub struct Connection {
    source: Source,
    context: Option<String>,
    impersonate: Option<String>,
}

/// Where the address and the credentials come from.
enum Source {
    /// A kubeconfig.
    File(Box<Kubeconfig>),
    /// The pod that this program runs in.
    Pod(Box<Config>),
    /// Neither, and why.
    Missing(String),
}

impl Connection {
    /// Reads the kubeconfig that the options and KUBECONFIG name.
    pub fn read(global: &Global) -> Self {
        let read = match &global.kubeconfig {
            Some(file) => Kubeconfig::read_from(file),
            None => Kubeconfig::read(),
        };
        let source = match read {
            Ok(kubeconfig) => Source::File(Box::new(kubeconfig)),
            Err(error) if global.kubeconfig.is_some() => Source::Missing(error.to_string()),
            Err(error) => match Config::incluster() {
                Ok(config) => Source::Pod(Box::new(config)),
                Err(_) => Source::Missing(error.to_string()),
            },
        };
        Self { source, context: global.context.clone(), impersonate: global.impersonate.clone() }
    }

    /// The namespace to look at if the command line names none.
    pub fn namespace(&self) -> String {
        match &self.source {
            Source::File(kubeconfig) => namespace_of(kubeconfig, self.context.as_deref()),
            Source::Pod(config) => config.default_namespace.clone(),
            Source::Missing(_) => "default".to_owned(),
        }
    }

    /// Makes a client. Nothing is sent yet. `read_timeout`: how long an answer may be silent.
    ///
    /// # Errors
    /// The kubeconfig is missing or unusable.
    pub async fn client(&self, read_timeout: Option<Duration>) -> Result<Client, CliError> {
        let config = self.configuration(read_timeout).await?;
        Ok(Client::try_from(config)?)
    }

    async fn configuration(&self, read_timeout: Option<Duration>) -> Result<Config, CliError> {
        let mut config = match &self.source {
            Source::Missing(why) => {
                let hint = "set KUBECONFIG or --kubeconfig, as for kubectl";
                return Err(CliError::failed(format!("no cluster to connect to: {why}")).hint(hint));
            }
            Source::Pod(config) => Config::clone(config),
            Source::File(kubeconfig) => self.config(kubeconfig).await?,
        };
        config.connect_timeout = Some(TIMEOUT);
        config.read_timeout = read_timeout;
        if let Some(user) = &self.impersonate {
            config.auth_info.impersonate = Some(user.clone());
        }
        Ok(config)
    }

    async fn config(&self, kubeconfig: &Kubeconfig) -> Result<Config, CliError> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let read = Config::from_custom_kubeconfig(kubeconfig.clone(), &options).await;
        let mut config = read.map_err(|error| {
            let hint = "`kubectl config get-contexts` lists the contexts; choose one with --context";
            CliError::failed(format!("the kubeconfig is unusable: {error}")).hint(hint)
        })?;
        let except = std::env::var("NO_PROXY").or_else(|_| std::env::var("no_proxy")).unwrap_or_default();
        let host = config.cluster_url.host().unwrap_or_default();
        if !names_proxy(kubeconfig, self.context.as_deref()) && proxy::bypasses(host, &except) {
            config.proxy_url = None;
        }
        Ok(config)
    }
}

/// The context that is used, by its name.
fn context_of<'a>(kubeconfig: &'a Kubeconfig, context: Option<&str>) -> Option<&'a kube::config::Context> {
    let name = context.or(kubeconfig.current_context.as_deref())?;
    kubeconfig.contexts.iter().find(|known| known.name == name)?.context.as_ref()
}

/// The namespace of a context of the kubeconfig.
fn namespace_of(kubeconfig: &Kubeconfig, context: Option<&str>) -> String {
    let namespace = context_of(kubeconfig, context).and_then(|context| context.namespace.clone());
    namespace.filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".to_owned())
}

/// Whether the context's cluster itself names a proxy. Otherwise a proxy comes from the environment.
fn names_proxy(kubeconfig: &Kubeconfig, context: Option<&str>) -> bool {
    let name = context_of(kubeconfig, context).map(|context| &context.cluster);
    let named = kubeconfig.clusters.iter().find(|known| Some(&known.name) == name);
    let proxy = named.and_then(|named| named.cluster.as_ref()?.proxy_url.as_ref());
    proxy.is_some_and(|proxy| !proxy.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
current-context: here
contexts:
- {name: here, context: {cluster: near, user: me, namespace: shop}}
- {name: there, context: {cluster: far, user: me}}
clusters:
- {name: near, cluster: {server: 'https://127.0.0.1:6443'}}
- {name: far, cluster: {server: 'https://k8s.example:6443', proxy-url: 'http://proxy.example:3128'}}
users: []
";

    #[test]
    fn the_namespace_is_that_of_the_context_which_is_used() {
        let kubeconfig = Kubeconfig::from_yaml(KUBECONFIG).unwrap();
        assert_eq!(namespace_of(&kubeconfig, None), "shop");
        assert_eq!(namespace_of(&kubeconfig, Some("there")), "default");
        assert_eq!(namespace_of(&kubeconfig, Some("nowhere")), "default");
        assert_eq!(namespace_of(&Kubeconfig::default(), None), "default");
    }

    #[tokio::test]
    async fn only_a_client_for_streams_waits_without_end_for_bytes() {
        let kubeconfig = Kubeconfig::from_yaml(KUBECONFIG).unwrap();
        let source = Source::File(Box::new(Kubeconfig {
            auth_infos: vec![serde_yaml::from_str("{name: me, user: {}}").unwrap()],
            ..kubeconfig
        }));
        let connection = Connection { source, context: None, impersonate: None };
        for timeout in [Some(Duration::from_secs(15)), None] {
            let config = connection.configuration(timeout).await.unwrap();
            assert_eq!((config.read_timeout, config.connect_timeout), (timeout, Some(TIMEOUT)));
        }
    }

    #[test]
    fn a_proxy_of_the_kubeconfig_is_told_from_one_of_the_environment() {
        let kubeconfig = Kubeconfig::from_yaml(KUBECONFIG).unwrap();
        assert!(!names_proxy(&kubeconfig, None));
        assert!(names_proxy(&kubeconfig, Some("there")));
    }
}
