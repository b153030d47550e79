//! The CustomResourceDefinitions of the Gateway API. Whoever runs the cluster installs them, here the tests: Tulle uses
//! them where they are, and neither installs nor changes them.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::cluster;
use crate::kubectl::Kube;
use crate::progress::step;

/// The routes that Tulle reads.
const ROUTES: [&str; 4] = ["httproutes", "grpcroutes", "tlsroutes", "tcproutes"];

/// Installs the definitions of the standard channel, once per run. On a cluster that is not ours, those that are there
/// stay.
pub fn install(kube: &Kube) -> Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    let names = ROUTES.map(|route| format!("crd/{route}.gateway.networking.k8s.io"));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let found = kube.run(&[&["get", "--ignore-not-found", "-o", "name"], &names[..]].concat())?;
    let theirs = matches!(kube, Kube::Context(_)) && found.lines().count() == names.len();
    if !theirs {
        step("installing the CustomResourceDefinitions of the Gateway API");
        kube.apply_server_side(&cluster::gateway_api()?.definitions)?;
    }
    let established = ["wait", "--for=condition=Established", "--timeout=60s"];
    kube.run(&[&established[..], &names[..]].concat())?;
    *installed = true;
    Ok(())
}
