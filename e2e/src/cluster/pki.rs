//! Creates the certificates and kubeconfigs of the cluster.

use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use super::files::Node;
use crate::host;

/// Users that get a kubeconfig: file name, common name, group.
const USERS: &[(&str, &str, &str)] = &[
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy", "system:kube-proxy", ""),
];

/// Creates all files below `folder`, unless they are complete already.
pub fn create(folder: &Path, nodes: &[Node]) -> Result<()> {
    let Some(first) = nodes.first() else { return Ok(()) };
    let address = first.address();
    if folder.join("complete").exists() {
        return Ok(());
    }
    let authority = authority()?;
    host::write(&folder.join("ca.crt"), authority.pem())?;
    let server = Pair { folder, name: "apiserver", common_name: "kube-apiserver", organization: "" };
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"];
    server.issue(&authority, &[&names[..], &["127.0.0.1", "10.96.0.1", &address]].concat())?;
    for node in nodes {
        let (name, user) = (node.name(), format!("system:node:{}", node.name()));
        let server = format!("{name}-server");
        let server = Pair { folder, name: &server, common_name: &user, organization: "system:nodes" };
        server.issue(&authority, &[&name, &node.address()])?;
        Pair { folder, name: &name, common_name: &user, organization: "system:nodes" }
            .issue(&authority, &[])?;
        host::write(&folder.join(format!("{name}.conf")), kubeconfig(folder, &name, &address))?;
    }
    let client = Pair {
        folder,
        name: "kubelet-client",
        common_name: "kube-apiserver-kubelet-client",
        organization: "system:masters",
    };
    client.issue(&authority, &[])?;
    for (name, common_name, organization) in USERS {
        Pair { folder, name, common_name, organization }.issue(&authority, &[])?;
        host::write(&folder.join(format!("{name}.conf")), kubeconfig(folder, name, &address))?;
    }
    let tokens = KeyPair::generate()?;
    host::write(&folder.join("sa.key"), tokens.serialize_pem())?;
    host::write(&folder.join("sa.pub"), tokens.public_key_pem())?;
    host::write(&folder.join("complete"), "")
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "tulle embedded cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

/// A certificate and its key.
struct Pair<'a> {
    folder: &'a Path,
    name: &'a str,
    common_name: &'a str,
    organization: &'a str,
}

impl Pair<'_> {
    fn issue(&self, authority: &CertifiedIssuer<'_, KeyPair>, names: &[&str]) -> Result<()> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, self.common_name);
        if !self.organization.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, self.organization);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, authority)?;
        host::write(&self.folder.join(format!("{}.crt", self.name)), certificate.pem())?;
        host::write(&self.folder.join(format!("{}.key", self.name)), key.serialize_pem())
    }
}

fn kubeconfig(folder: &Path, user: &str, address: &str) -> String {
    let folder = folder.display();
    format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: tulle, cluster: {{server: 'https://{address}:6443', certificate-authority: {folder}/ca.crt}}}}]
users: [{{name: {user}, user: {{client-certificate: {folder}/{user}.crt, client-key: {folder}/{user}.key}}}}]
contexts: [{{name: tulle, context: {{cluster: tulle, user: {user}}}}}]
current-context: tulle
"
    )
}
