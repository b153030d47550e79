//! Whether something that a user has named exists: without traffic, a name that is wrong looks like one that is right.

use crate::cluster::Context;
use crate::exit::CliError;
use crate::objects::{self, Kind, Read, Unread};

/// What may be meant by the name of a workload.
pub const WORKLOADS: [Kind; 5] =
    [objects::DEPLOYMENT, objects::STATEFUL_SET, objects::DAEMON_SET, objects::JOB, objects::POD];

/// Fails if no object of these kinds has this name. An object that the user may not read counts as existing.
///
/// # Errors
/// No such object exists, or the cluster cannot be reached.
pub async fn named(context: &Context, kinds: &[Kind], namespace: &str, name: &str) -> Result<(), CliError> {
    let client = context.client().await?;
    let mut found = Vec::with_capacity(kinds.len());
    for kind in kinds {
        let read = objects::get(&client, *kind, Some(namespace), name).await;
        found.push(read.map(|object| object.is_some()));
        if found.last() == Some(&Ok(true)) {
            break;
        }
    }
    missing(kinds, &found, namespace, name).map_or(Ok(()), Err)
}

/// The error about a name that no object has.
fn missing(kinds: &[Kind], found: &[Read<bool>], namespace: &str, name: &str) -> Option<CliError> {
    // A kind that the cluster does not have has no objects.
    let is_absent = |read: &Read<bool>| matches!(read, Ok(false) | Err(Unread::NotServed));
    let what = match kinds.len() > 1 && kinds.contains(&objects::POD) {
        true => "workload or pod".to_owned(),
        false => kinds.iter().map(|kind| kind.kind).collect::<Vec<_>>().join(" or "),
    };
    let error = || CliError::failed(format!("there is no {what} {name} in namespace {namespace}"));
    found.iter().all(is_absent).then(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_surely_does_not_exist_is_an_error() {
        let forbidden = || Err(Unread::Forbidden("no".into()));
        let error = |kinds: &[Kind], found: &[Read<bool>]| missing(kinds, found, "shop", "web");
        let none = error(&[objects::SERVICE], &[Ok(false)]).unwrap();
        assert_eq!(
            (none.to_string().as_str(), none.code()),
            ("there is no Service web in namespace shop", 1)
        );
        let found = [Ok(false), Err(Unread::NotServed), Ok(false)];
        let none = error(&WORKLOADS, &found).unwrap();
        assert_eq!(none.to_string(), "there is no workload or pod web in namespace shop");
        assert_eq!(error(&WORKLOADS, &[Ok(false), Ok(true)]), None);
        let either = [objects::SERVICE, objects::SERVICE_ACCOUNT];
        let none = error(&either, &[Ok(false), Ok(false)]).unwrap();
        assert_eq!(none.to_string(), "there is no Service or ServiceAccount web in namespace shop");
        assert_eq!(error(&WORKLOADS, &[Ok(false), forbidden()]), None, "it may be one that is not shown");
    }
}
