//! `tulle report`: a directory with what a bug report needs, without secrets.
//!
//! ```text
//!   redact   takes secrets out of objects and logs; pure
//! ```
//! It reads no Secret, and of ConfigMaps only the names of those with the trust bundle. What could not be read is
//! listed in `missing.txt`; the rest is written all the same.

mod redact;

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use kube::api::LogParams;
use kube::{Api, Client};
use serde::Serialize;
use serde_json::{Value, json};
use tulle_crds::keys;
use tulle_mesh::query::{self, Paths};

use super::check;
use crate::cluster::Context;
use crate::exit::CliError;
use crate::manifests::DEPLOYMENTS;
use crate::objects::{self, Kind, Read, full_name, items, name, text};
use crate::output::{Output, write};

/// Lines of each log.
const LINES: i64 = 2000;

/// Options of `tulle report`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// The directory to write, which must be empty or not exist; tulle-report-TIME if absent
    #[arg(value_name = "DIRECTORY")]
    pub directory: Option<PathBuf>,
}

/// What is listed in each file.
const LISTS: [(&str, Kind); 5] = [
    ("meshpolicies.yaml", objects::MESH_POLICY),
    ("canaries.yaml", objects::CANARY),
    ("meshconfigs.yaml", objects::MESH_CONFIG),
    ("httproutes.yaml", objects::HTTP_ROUTE),
    ("grpcroutes.yaml", objects::GRPC_ROUTE),
];

/// Writes the directory.
///
/// # Errors
/// The directory cannot be written, or there is no cluster to ask.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let client = context.client().await?;
    let mut bundle = Bundle::create(args.directory.unwrap_or_else(default_directory))?;
    let checked = check::report(context, &check::Args::default()).await?;
    bundle.json("check.json", &checked)?;
    bundle.text("check.txt", &checked.text(&Output::default(), false))?;
    operator(context, &client, &mut bundle).await?;
    let system = match context.locate().await {
        Ok(located) => located.namespace,
        Err(_) => context.system.clone(),
    };
    for (file, kind) in LISTS {
        let namespace = context.namespace().filter(|_| kind.namespaced);
        bundle.list(file, objects::list(&client, kind, namespace, None).await)?;
    }
    let deployments = objects::list(&client, objects::DEPLOYMENT, Some(&system), None).await;
    bundle.list("deployments.yaml", deployments.map(own))?;
    bundle.list("events.yaml", objects::list(&client, objects::EVENT, Some(&system), None).await)?;
    bundle.list("webhooks.yaml", webhooks(&client).await)?;
    trust(&client, &mut bundle).await?;
    pods(&client, &system, &mut bundle).await?;
    bundle.finish()
}

fn default_directory() -> PathBuf {
    let now = jiff::Timestamp::now().as_second();
    PathBuf::from(format!("tulle-report-{now}"))
}

/// Tulle's own Deployments, by the pods that they select: they have no labels themselves. What else is in its namespace is
/// nobody's business.
fn own(mut deployments: Vec<Value>) -> Vec<Value> {
    deployments.retain(|found| DEPLOYMENTS.contains(&text(found, "/spec/selector/matchLabels/app")));
    deployments
}

/// Versions, and what the operator answers.
async fn operator(context: &Context, client: &Client, bundle: &mut Bundle) -> Result<(), CliError> {
    let server = client.apiserver_version().await.map(|info| info.git_version);
    let mut version = json!({"tulle": env!("CARGO_PKG_VERSION"), "kubernetes": server.unwrap_or_default()});
    match context.operator().await {
        Err(error) => bundle.missing("health.json and sidecars.json", &error),
        Ok(operator) => {
            match operator.get::<query::Health>(Paths::HEALTH, &[]).await {
                Ok(health) => {
                    if let Some(version) = version.as_object_mut() {
                        version.insert("operator".to_owned(), json!(health.version));
                    }
                    bundle.json("health.json", &health)?;
                }
                Err(error) => bundle.missing("health.json", &error),
            }
            let namespace = context.namespace().map(|namespace| ("namespace", namespace));
            let parameters: Vec<(&str, &str)> = namespace.into_iter().collect();
            match operator.get::<query::Sidecars>(Paths::SIDECARS, &parameters).await {
                Ok(sidecars) => bundle.json("sidecars.json", &sidecars)?,
                Err(error) => bundle.missing("sidecars.json", &error),
            }
        }
    }
    bundle.json("version.json", &version)
}

async fn webhooks(client: &Client) -> Read<Vec<Value>> {
    let mutating = objects::get(client, objects::MUTATING, None, "tulle").await?;
    let validating = objects::get(client, objects::VALIDATING, None, "tulle").await?;
    Ok(mutating.into_iter().chain(validating).collect())
}

/// The names of the ConfigMaps with the trust bundle, and nothing that they hold.
async fn trust(client: &Client, bundle: &mut Bundle) -> Result<(), CliError> {
    let label = format!("{}=bundle", keys::TRUST);
    match objects::list(client, objects::CONFIG_MAP, None, Some(&label)).await {
        Ok(found) => bundle.json("trust-bundles.json", &found.iter().map(full_name).collect::<Vec<_>>()),
        Err(why) => {
            bundle.missing("trust-bundles.json", &why);
            Ok(())
        }
    }
}

/// The pods of operator and webhook, and their logs.
async fn pods(client: &Client, system: &str, bundle: &mut Bundle) -> Result<(), CliError> {
    let selector = format!("app in ({})", DEPLOYMENTS.join(","));
    let found = objects::list(client, objects::POD, Some(system), Some(&selector)).await;
    if let Ok(pods) = &found {
        for pod in pods {
            for status in items(pod, "/status/containerStatuses") {
                logs(client, system, name(pod), status, bundle).await?;
            }
        }
    }
    bundle.list("pods.yaml", found)
}

async fn logs(
    client: &Client,
    system: &str,
    pod: &str,
    status: &Value,
    bundle: &mut Bundle,
) -> Result<(), CliError> {
    let api = Api::<Pod>::namespaced(client.clone(), system);
    let container = text(status, "/name");
    let restarted = objects::number(status, "/restartCount").unwrap_or(0) > 0;
    for previous in [false, true] {
        if previous && !restarted {
            continue;
        }
        let params = LogParams {
            container: Some(container.to_owned()),
            previous,
            tail_lines: Some(LINES),
            timestamps: true,
            ..LogParams::default()
        };
        let file = format!("{pod}-{container}{}.log", if previous { "-previous" } else { "" });
        match api.logs(pod, &params).await {
            Ok(log) => bundle.text(&file, &redact::log(&log))?,
            Err(error) => bundle.missing(&file, &error),
        }
    }
    Ok(())
}

/// A directory that is being written.
struct Bundle {
    directory: PathBuf,
    files: usize,
    missing: Vec<String>,
}

impl Bundle {
    fn create(directory: PathBuf) -> Result<Self, CliError> {
        let failed = |error: std::io::Error| {
            CliError::failed(format!("cannot write to {}: {error}", directory.display()))
        };
        // What it holds is for the person who runs this, not for others on this machine.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(failed)?;
        // Files of somebody else must not be sent with the report.
        if std::fs::read_dir(&directory).map_err(failed)?.next().is_some() {
            return Err(CliError::failed(format!("{} is not empty", directory.display()))
                .hint("name a directory that does not exist"));
        }
        // It may have been there.
        std::fs::set_permissions(&directory, Permissions::from_mode(0o700)).map_err(failed)?;
        Ok(Self { directory, files: 0, missing: Vec::new() })
    }

    fn text(&mut self, file: &str, text: &str) -> Result<(), CliError> {
        let path: &Path = &self.directory.join(file);
        self.files += 1;
        std::fs::write(path, text)
            .map_err(|error| CliError::failed(format!("cannot write {}: {error}", path.display())))
    }

    fn json<T: Serialize>(&mut self, file: &str, value: &T) -> Result<(), CliError> {
        match serde_json::to_string_pretty(value) {
            Ok(text) => self.text(file, &(text + "\n")),
            Err(error) => {
                self.missing(file, &error);
                Ok(())
            }
        }
    }

    /// Objects without their secrets.
    fn list(&mut self, file: &str, objects: Read<Vec<Value>>) -> Result<(), CliError> {
        let objects = match objects {
            Ok(objects) => objects,
            Err(why) => {
                self.missing(file, &why);
                return Ok(());
            }
        };
        let redacted: Vec<Value> = objects.into_iter().map(redact::object).collect();
        match crate::manifests::yaml(&redacted) {
            Ok(text) => self.text(file, &text),
            Err(error) => {
                self.missing(file, &error);
                Ok(())
            }
        }
    }

    fn missing(&mut self, what: &str, why: &dyn std::fmt::Display) {
        self.missing.push(format!("{what}: {why}"));
    }

    fn finish(mut self) -> Result<(), CliError> {
        if !self.missing.is_empty() {
            let text = self.missing.join("\n") + "\n";
            self.text("missing.txt", &text)?;
        }
        let directory = self.directory.display().to_string();
        write(&format!(
            "wrote {} files to {directory}; pack them with: tar czf {directory}.tar.gz {directory}\n",
            self.files
        ))?;
        if let Some(note) = incomplete(&directory, self.missing.len()) {
            crate::exit::note(&note);
        }
        crate::exit::note(
            "Secrets were not read, and values of variables and tokens were removed. Names, addresses and paths of your cluster are in it: look before you send it.",
        );
        Ok(())
    }
}

/// A note about what could not be read.
fn incomplete(directory: &str, missing: usize) -> Option<String> {
    let what = if missing == 1 { "1 part is".to_owned() } else { format!("{missing} parts are") };
    (missing > 0).then(|| {
        format!(
            "note: {what} missing, most often for want of rights: {directory}/missing.txt says which, and why"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_holds_secrets_is_listed() {
        let kinds = LISTS.map(|(_, kind)| kind.kind);
        assert!(!kinds.contains(&"ConfigMap") && !kinds.contains(&"Secret"), "{kinds:?}");
    }

    #[test]
    fn deployments_of_others_in_the_namespace_of_tulle_are_left_out() {
        let of = |app: &str| json!({"spec": {"selector": {"matchLabels": {"app": app}}}});
        let found = own(vec![of("tulle-operator"), of("grafana"), json!({}), of("tulle-webhook")]);
        assert_eq!(found, [of("tulle-operator"), of("tulle-webhook")]);
    }

    #[test]
    fn a_note_says_where_the_missing_parts_are_listed() {
        assert_eq!(incomplete("report", 0), None);
        let note = incomplete("report", 7).unwrap();
        assert!(
            note.starts_with("note: 7 parts are missing") && note.contains("report/missing.txt"),
            "{note}"
        );
    }

    #[test]
    fn the_directory_is_for_its_owner_only() {
        let directory = std::env::temp_dir().join(format!("tulle-report-test-{}", std::process::id()));
        let mut bundle = Bundle::create(directory.clone()).unwrap();
        bundle.text("a.txt", "a").unwrap();
        let mode = std::fs::metadata(&directory).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(Bundle::create(directory.clone()).is_err(), "it is not empty");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
