//! `tulle explain`: what would become of a request, stage by stage, and which object decides it; or what
//! became of one that was refused ([`denial`]).

mod denial;

use std::net::{IpAddr, SocketAddr};

use hyper::Method;
use tulle_mesh::denial::DenialId;
use tulle_mesh::query::{Explanation, Paths, Stage, Verdict};

use crate::cluster::{Context, within};
use crate::exit::CliError;
use crate::objects;
use crate::output::{Colour, Format, Output, Table, plain, write};

/// Kinds that may stand before the name of a client, beside namespaces.
const KINDS: [&str; 12] = [
    "deployment",
    "deployments",
    "deploy",
    "statefulset",
    "statefulsets",
    "sts",
    "daemonset",
    "daemonsets",
    "ds",
    "pod",
    "pods",
    "po",
];
/// Kinds that may stand before the name of a destination, beside namespaces.
const SERVICES: [&str; 3] = ["service", "services", "svc"];

/// Options of `tulle explain`. It ends with exit code 0 if the request reaches the application, and 3 if it does not.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Exit code 0: the request reaches the application; 3: it does not.")]
pub struct Args {
    /// Who sends the request: NAME, KIND/NAME or NAMESPACE/NAME of a workload or pod
    #[arg(value_name = "SRC", required_unless_present = "denial")]
    source: Option<String>,
    /// The Service that it is sent to: NAME[.NAMESPACE][:PORT], NAMESPACE/NAME[:PORT], or an address
    #[arg(value_name = "DST", required_unless_present = "denial")]
    destination: Option<String>,
    /// The method of the request, as --method
    #[arg(value_name = "METHOD")]
    positional_method: Option<String>,
    /// The path of the request, as --path; METHOD may be left out before a path that begins with /
    #[arg(value_name = "PATH")]
    positional_path: Option<String>,
    /// Instead: a request that was refused, by the id in the header tulle-denial of its answer or in the sidecar's log.
    /// Shows the rule, and what would become of the request now
    #[arg(long, value_name = "ID", conflicts_with_all = ["source", "destination", "method", "path", "headers"])]
    denial: Option<DenialId>,
    /// The method of the request; GET if absent
    #[arg(long)]
    method: Option<String>,
    /// The path of the request, with its query; / if absent
    #[arg(long)]
    path: Option<String>,
    /// A header of the request; may be given several times
    #[arg(long = "header", short = 'H', value_name = "NAME:VALUE")]
    headers: Vec<String>,
}

/// Method and path of the request that is explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The method, as the user wrote it.
    pub method: &'a str,
    /// The path with its query.
    pub path: &'a str,
}

impl Args {
    /// Method and path, each of which is an argument, an option or the default.
    ///
    /// # Errors
    /// An argument and its option differ, the method is invalid, or the path stands before the method. Clap knows neither, because it takes a
    /// path without a method for the method.
    pub fn request(&self) -> Result<Request<'_>, String> {
        let (method, path) = match (self.positional_method.as_deref(), self.positional_path.as_deref()) {
            (Some(path), None) if path.starts_with('/') => (None, Some(path)),
            (Some(path), Some(_)) if path.starts_with('/') => {
                return Err(format!("path {path} stands where the method is expected: write METHOD PATH"));
            }
            given => given,
        };
        let method = either("method", method, self.method.as_deref())?.unwrap_or("GET");
        if Method::from_bytes(method.as_bytes()).is_err() {
            return Err(format!("invalid method {method:?}; write one such as GET"));
        }
        Ok(Request { method, path: either("path", path, self.path.as_deref())?.unwrap_or("/") })
    }
}

/// A value that may be an argument or the option of this name.
fn either<'a>(
    name: &str,
    argument: Option<&'a str>,
    option: Option<&'a str>,
) -> Result<Option<&'a str>, String> {
    match (argument, option) {
        (Some(one), Some(other)) if one != other => {
            Err(format!("the {name} is given twice: as {one}, and with --{name} as {other}"))
        }
        _ => Ok(argument.or(option)),
    }
}

/// Runs `tulle explain`.
///
/// # Errors
/// [`CliError::Findings`] if the request does not reach the application; or the operator cannot answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    if let Some(id) = args.denial {
        return denial::run(context, id).await;
    }
    let request = args.request().map_err(CliError::Usage)?;
    // Clap asks for both.
    let source = workload(args.source.as_deref().unwrap_or_default(), context.namespace())?;
    let destination = destination(args.destination.as_deref().unwrap_or_default(), context.namespace())?;
    visible(context, &source.0)?;
    reachable(context, &destination).await?;
    let source = format!("{}/{}", source.0, source.1);
    let mut parameters = vec![
        ("source", source.as_str()),
        ("destination", destination.text.as_str()),
        ("method", request.method),
        ("path", request.path),
    ];
    for header in &args.headers {
        if !header.contains(':') {
            return Err(CliError::Usage(format!("header {header:?} has no value; write name:value")));
        }
        parameters.push(("header", header.as_str()));
    }
    let operator = context.operator().await?;
    let explained: Explanation = operator.get(Paths::EXPLAIN, &parameters).await?;
    match context.output.format {
        Format::Table | Format::Wide => write(&text(&context.output, &explained))?,
        Format::Json | Format::Yaml | Format::Name => {
            context.output.print(&explained, |_| table(&context.output, &explained))?;
        }
    }
    ended(&explained)
}

/// The exit code. Where the request goes on out of sight, nobody has said that it does not arrive.
fn ended(explained: &Explanation) -> Result<(), CliError> {
    let stopped = explained.stages.last().is_none_or(|stage| stage.verdict == Verdict::Stop);
    match (explained.reaches, stopped) {
        (true, _) => Ok(()),
        (false, true) => Err(CliError::Findings),
        (false, false) => {
            let what =
                "what becomes of the request is decided in a namespace that this command does not show";
            Err(CliError::failed(what).hint("add -A, and write NAMESPACE/NAME"))
        }
    }
}

/// A command has a token for the namespaces that it looks at, and for no other.
pub fn visible(context: &Context, namespace: &str) -> Result<(), CliError> {
    match context.namespace() {
        Some(own) if own != namespace => Err(CliError::Usage(format!(
            "this command looks at namespace {own}, not at {namespace}: add -n {namespace} if all of it is there, or else -A"
        ))),
        _ => Ok(()),
    }
}

/// Namespace and name of a workload or pod in `name`, `kind/name` or `namespace/name`.
///
/// # Errors
/// Something is missing, or is left over.
pub fn workload(text: &str, namespace: Option<&str>) -> Result<(String, String), CliError> {
    named(text, namespace, &KINDS)
}

/// What a request is sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// As the operator takes it: `namespace/name` or an address, with `:port` behind it if there is one.
    pub text: String,
    /// The namespace of the Service; `None`: it is an address, of which the operator knows whose it is.
    pub namespace: Option<String>,
    /// The name as the user wrote it, if it is one of DNS.
    dns: Option<String>,
}

impl Destination {
    /// Namespace and name of the Service. The port is left out.
    ///
    /// # Errors
    /// It is an address.
    pub fn service(&self) -> Result<(String, String), CliError> {
        let (Some(namespace), Some((_, name))) = (&self.namespace, self.text.split_once('/')) else {
            let what = format!("{} is an address; write the name of a Service", self.text);
            return Err(CliError::Usage(what));
        };
        Ok((namespace.clone(), name.split(':').next().unwrap_or_default().to_owned()))
    }
}

/// Whether the text is an address, with or without a port.
fn is_address(text: &str) -> bool {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    text.parse::<SocketAddr>().is_ok() || bare.parse::<IpAddr>().is_ok()
}

/// The error about a name of DNS that is not a Service's.
fn outside(name: &str, why: &str) -> CliError {
    let what = format!(
        "{name} is outside the mesh, because {why}: the client's sidecar passes its connections through as they are, \
         without policies"
    );
    CliError::failed(what).hint("if it resolves to an address of the cluster, write the address instead")
}

/// Whether this command may ask about the destination. A name of DNS may be one of the Internet, and look like a Service in
/// another namespace.
async fn reachable(context: &Context, destination: &Destination) -> Result<(), CliError> {
    let Some(namespace) = &destination.namespace else { return Ok(()) };
    let own = context.namespace() == Some(namespace.as_str());
    let Some(name) = destination.dns.as_ref().filter(|_| !own) else { return visible(context, namespace) };
    let client = context.client().await?;
    let found = within("looking for the namespace", async {
        Ok(objects::get(&client, objects::NAMESPACE, None, namespace).await)
    });
    if matches!(found.await?, Ok(None)) {
        return Err(outside(name, &format!("namespace {namespace} does not exist")));
    }
    visible(context, namespace).map_err(|error| {
        CliError::Usage(format!(
            "{error}; {name} is taken for a Service of namespace {namespace}: what is outside the mesh cannot be explained, \
             because the client's sidecar passes it through as it is"
        ))
    })
}

/// A Service or an address.
///
/// # Errors
/// Something is missing, or is left over; or it is a name that no Service has.
pub fn destination(text: &str, namespace: Option<&str>) -> Result<Destination, CliError> {
    if is_address(text) {
        return Ok(Destination { text: text.to_owned(), namespace: None, dns: None });
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    if let Some(port) = port
        && port.parse::<u16>().is_err()
    {
        return Err(CliError::Usage(format!("invalid port {port:?} in {text}")));
    }
    // As in DNS: service.namespace.svc.cluster.local.
    let dns = if name.contains('/') { None } else { name.trim_end_matches('.').split_once('.') };
    let dns_name = dns.map(|_| name.to_owned());
    let (namespace, name) = match dns {
        Some((service, rest)) => {
            let mut labels = rest.split('.');
            let namespace = labels.next().unwrap_or_default();
            let mut others = labels.clone();
            if let (Some(of), Some("svc")) = (others.next(), others.next()) {
                let what = format!("{name} is the name of a pod; write its Service, as {namespace}.{of}");
                return Err(CliError::Usage(what));
            }
            if labels.next().is_some_and(|label| label != "svc") {
                let why = "Services are named NAME.NAMESPACE or NAME.NAMESPACE.svc.cluster.local";
                return Err(outside(name, why));
            }
            named(&format!("{namespace}/{service}"), None, &[])?
        }
        None => named(name, namespace, &SERVICES)?,
    };
    let text = match port {
        Some(port) => format!("{namespace}/{name}:{port}"),
        None => format!("{namespace}/{name}"),
    };
    Ok(Destination { text, namespace: Some(namespace), dns: dns_name })
}

fn named(text: &str, namespace: Option<&str>, kinds: &[&str]) -> Result<(String, String), CliError> {
    let (first, name) = match text.split_once('/') {
        Some((first, name)) if kinds.contains(&first.to_ascii_lowercase().as_str()) => (None, name),
        Some((first, name)) => (Some(first), name),
        None => (None, text),
    };
    if name.is_empty() || name.contains('/') || first.is_some_and(str::is_empty) {
        return Err(CliError::Usage(format!("invalid name {text:?}; write NAME or NAMESPACE/NAME")));
    }
    let Some(namespace) = first.or(namespace) else {
        return Err(CliError::Usage(format!(
            "{name} is in which namespace? With -A, write NAMESPACE/{name}"
        )));
    };
    Ok((namespace.to_owned(), name.to_owned()))
}

/// Numbered stages, and the outcome.
fn text(output: &Output, explained: &Explanation) -> String {
    let mut text = String::new();
    for (index, stage) in explained.stages.iter().enumerate() {
        let object = if stage.object.is_empty() { String::new() } else { format!("{}: ", stage.object) };
        // Padded before it is coloured, since colours have no width.
        let mark = mark(output, stage.verdict, 9);
        text.push_str(&format!(
            "{:>2}  {mark}  {:<8}  {}{}\n",
            index + 1,
            plain(&stage.name),
            plain(&object),
            plain(&stage.because)
        ));
    }
    text.push_str(&format!("\n{}\n", plain(&explained.outcome)));
    text
}

/// How a stage ends, as a sign and a word.
fn mark(output: &Output, verdict: Verdict, width: usize) -> String {
    let (text, colour) = match verdict {
        Verdict::Pass => ("√ pass", Colour::Green),
        Verdict::Stop => ("× stop", Colour::Red),
        Verdict::Depends => ("? depends", Colour::Yellow),
    };
    output.paint(colour, &format!("{text:<width$}"))
}

fn table(output: &Output, explained: &Explanation) -> Table {
    let row = |stage: &Stage| {
        vec![stage.name.clone(), mark(output, stage.verdict, 0), stage.object.clone(), stage.because.clone()]
    };
    Table {
        headers: vec!["NAME", "VERDICT", "OBJECT", "BECAUSE"],
        rows: explained.stages.iter().map(row).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::args::{self, Command};

    /// The options of `tulle explain web cart` with more words.
    fn asked(more: &str) -> Args {
        let words = ["tulle", "explain", "web", "cart"].into_iter().chain(more.split_whitespace());
        let cli = args::parse(words.map(OsString::from)).unwrap_or_else(|error| panic!("{more}: {error}"));
        let Command::Explain(args) = cli.command else { panic!("another command") };
        args
    }

    #[test]
    fn method_and_path_are_arguments_or_options() {
        for (more, method, path) in [
            ("", "GET", "/"),
            ("POST", "POST", "/"),
            ("POST /v1/x?a=b", "POST", "/v1/x?a=b"),
            ("/v1/x", "GET", "/v1/x"),
            ("/v1/x --method POST", "POST", "/v1/x"),
            ("--method POST --path /v1/x", "POST", "/v1/x"),
            ("POST --path /v1/x", "POST", "/v1/x"),
            ("POST /v1/x --method POST --path /v1/x", "POST", "/v1/x"),
            // The operator answers that a path begins with /, as for the option.
            ("POST v1/x", "POST", "v1/x"),
        ] {
            assert_eq!(asked(more).request(), Ok(Request { method, path }), "{more}");
        }
    }

    #[test]
    fn a_client_is_named_alone_with_its_kind_or_with_its_namespace() {
        for (text, expected) in [
            ("web", ("shop", "web")),
            ("deployment/web", ("shop", "web")),
            ("Pod/web-1", ("shop", "web-1")),
            ("payments/web", ("payments", "web")),
        ] {
            let found = workload(text, Some("shop")).unwrap();
            assert_eq!((found.0.as_str(), found.1.as_str()), expected, "{text}");
        }
        for text in ["", "/web", "web/", "a/b/c"] {
            assert_eq!(workload(text, Some("shop")).unwrap_err().code(), 2, "{text}");
        }
        let error = workload("web", None).unwrap_err().to_string();
        assert!(error.contains("NAMESPACE/web"), "{error}");
    }

    #[test]
    fn a_destination_is_named_as_in_dns_or_as_in_kubernetes() {
        for (text, expected) in [
            ("payments", "shop/payments"),
            ("payments:8080", "shop/payments:8080"),
            ("svc/payments", "shop/payments"),
            ("payments.billing", "billing/payments"),
            ("payments.billing.svc.cluster.local:80", "billing/payments:80"),
            ("billing/payments:80", "billing/payments:80"),
        ] {
            assert_eq!(destination(text, Some("shop")).unwrap().text, expected, "{text}");
        }
        for text in ["", ":80", "payments:http", "payments:70000", "a/b/c"] {
            assert_eq!(destination(text, Some("shop")).unwrap_err().code(), 2, "{text}");
        }
    }

    #[test]
    fn an_address_is_not_taken_for_a_name() {
        for text in ["10.244.0.34", "10.244.0.34:80", "8.8.8.8:53", "fd00::1", "[fd00::1]", "[fd00::1]:80"] {
            for namespace in [Some("shop"), None] {
                let expected = Destination { text: text.to_owned(), namespace: None, dns: None };
                assert_eq!(destination(text, namespace), Ok(expected), "{text}");
            }
        }
    }

    #[test]
    fn a_name_of_the_internet_is_outside_the_mesh() {
        for text in ["api.example.com", "api.example.com:443", "a.b.c.d"] {
            let error = destination(text, Some("shop")).unwrap_err();
            assert_eq!(error.code(), 1, "{text}");
            assert!(error.to_string().contains("is outside the mesh, because Services are named"), "{error}");
        }
        let error = destination("db-0.db.shop.svc.cluster.local:5432", Some("shop")).unwrap_err();
        assert!(
            error.to_string().ends_with("is the name of a pod; write its Service, as db.shop"),
            "{error}"
        );
        // Only the cluster knows that `com` is not a namespace.
        let found = destination("example.com:443", Some("shop")).unwrap();
        assert_eq!((found.text.as_str(), found.dns.as_deref()), ("com/example:443", Some("example.com")));
        assert_eq!(destination("com/example", Some("shop")).unwrap().dns, None);
    }

    #[test]
    fn a_method_is_one_word() {
        let args = Args { method: Some("G T".to_owned()), ..asked("") };
        assert!(args.request().unwrap_err().contains("invalid method"));
        assert_eq!(asked("PURGE").request().unwrap().method, "PURGE");
    }

    #[test]
    fn stages_are_numbered_and_say_in_words_how_they_end() {
        let stage = |name: &str, verdict, object: &str| Stage {
            name: name.to_owned(),
            verdict,
            object: object.to_owned(),
            because: "so it is".to_owned(),
        };
        let explained = Explanation {
            stages: vec![
                stage("source", Verdict::Pass, ""),
                stage("split", Verdict::Depends, "Canary/shop/web"),
                stage("access", Verdict::Stop, "MeshPolicy/shop/p"),
            ],
            outcome: "It does not.".to_owned(),
            reaches: false,
        };
        let expected = " 1  √ pass     source    so it is
 2  ? depends  split     Canary/shop/web: so it is
 3  × stop     access    MeshPolicy/shop/p: so it is

It does not.
";
        assert_eq!(text(&Output::default(), &explained), expected);
    }

    #[test]
    fn a_request_that_goes_on_out_of_sight_is_neither_reached_nor_refused() {
        let explained = |verdict, reaches| Explanation {
            stages: vec![Stage { verdict, ..Stage::default() }],
            reaches,
            ..Explanation::default()
        };
        assert_eq!(ended(&explained(Verdict::Depends, true)), Ok(()));
        assert_eq!(ended(&explained(Verdict::Stop, false)), Err(CliError::Findings));
        assert_eq!(ended(&explained(Verdict::Depends, false)).unwrap_err().code(), 1);
    }

    #[test]
    fn control_characters_of_an_explanation_are_not_printed() {
        let explained = Explanation {
            stages: vec![Stage { because: "a\u{1b}[2J\nb".to_owned(), ..Stage::default() }],
            outcome: "c\u{9b}".to_owned(),
            reaches: true,
        };
        let text = text(&Output::default(), &explained);
        assert!(text.contains("a\u{fffd}[2J\u{fffd}b\n") && text.ends_with("c\u{fffd}\n"), "{text:?}");
    }
}
