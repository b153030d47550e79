//! The command line: `init` with what is not redirected, or `proxy`. It is what the webhook writes, and read here without
//! a library whose help texts and suggestions every pod would carry.

use crate::init::Rules;

/// How this program is called.
pub const USAGE: &str = "\
Usage: tulle-sidecar COMMAND

  init   sets the redirect rules of this network namespace and exits
           --skip-inbound-ports PORT,…    inbound ports that stay as they are
           --skip-outbound-ports PORT,…   outbound ports that stay as they are
           --preserve-source-address      the application sees its clients' addresses
  proxy  runs the proxy, with its settings from the environment

  --help, --version";

/// What this program is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Sets the redirect rules of this network namespace and exits.
    Init(Rules),
    /// Runs the proxy.
    Proxy,
    /// Says how it is called.
    Help,
    /// Says which version it is.
    Version,
}

/// Why a command line cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// There is none.
    #[error("no command")]
    NoCommand,
    /// It has something that is not known there.
    #[error("unexpected argument {0:?}")]
    Unexpected(String),
    /// An option is last that needs a value.
    #[error("{0} needs a list of ports")]
    NoValue(String),
    /// An option's value is not a list of ports.
    #[error("{option}: invalid port {port:?}")]
    InvalidPort {
        /// The option.
        option: String,
        /// What is not a port.
        port: String,
    },
}

impl Command {
    /// Reads the arguments behind the program's name.
    ///
    /// # Errors
    /// What cannot be read of them.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, ArgumentError> {
        let mut arguments = arguments.into_iter();
        let command = match arguments.next().ok_or(ArgumentError::NoCommand)?.as_str() {
            "init" => return parse_rules(arguments).map(|rules| rules.map_or(Self::Help, Self::Init)),
            "proxy" => Self::Proxy,
            "help" | "--help" | "-h" => Self::Help,
            "--version" | "-V" => Self::Version,
            unknown => return Err(ArgumentError::Unexpected(unknown.to_owned())),
        };
        match arguments.next() {
            Some(help) if help == "--help" || help == "-h" => Ok(Self::Help),
            Some(more) => Err(ArgumentError::Unexpected(more)),
            None => Ok(command),
        }
    }
}

/// The options of `init`; `None`: help is wanted.
fn parse_rules(mut arguments: impl Iterator<Item = String>) -> Result<Option<Rules>, ArgumentError> {
    let mut rules = Rules::default();
    while let Some(argument) = arguments.next() {
        let (option, value) = match argument.split_once('=') {
            Some((option, value)) => (option, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        let ports = match (option, &value) {
            ("--skip-inbound-ports", _) => &mut rules.skip_inbound_ports,
            ("--skip-outbound-ports", _) => &mut rules.skip_outbound_ports,
            ("--preserve-source-address", None) => {
                rules.preserve_source_address = true;
                continue;
            }
            ("--help" | "-h", None) => return Ok(None),
            _ => return Err(ArgumentError::Unexpected(argument)),
        };
        let list = value.or_else(|| arguments.next());
        let list = list.ok_or_else(|| ArgumentError::NoValue(option.to_owned()))?;
        for port in list.split(',') {
            let invalid = |_| ArgumentError::InvalidPort { option: option.to_owned(), port: port.to_owned() };
            ports.push(port.parse::<u16>().map_err(invalid)?);
        }
    }
    Ok(Some(rules))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, ArgumentError> {
        Command::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_the_webhook_writes_is_read() {
        let rules = |inbound: &[u16], outbound: &[u16], preserve_source_address| {
            Ok(Command::Init(Rules {
                skip_inbound_ports: inbound.to_vec(),
                skip_outbound_ports: outbound.to_vec(),
                preserve_source_address,
            }))
        };
        assert_eq!(parse("proxy"), Ok(Command::Proxy));
        assert_eq!(parse("init"), rules(&[], &[], false));
        assert_eq!(parse("init --skip-outbound-ports=5432"), rules(&[], &[5432], false));
        assert_eq!(
            parse("init --skip-inbound-ports=22,23 --skip-outbound-ports 25 --preserve-source-address"),
            rules(&[22, 23], &[25], true)
        );
        assert_eq!(
            parse("init --skip-inbound-ports=22 --skip-inbound-ports=23"),
            rules(&[22, 23], &[], false)
        );
    }

    #[test]
    fn a_rule_that_cannot_be_read_is_not_left_out() {
        let unexpected = |what: &str| Err(ArgumentError::Unexpected(what.to_owned()));
        let invalid = |port: &str| {
            let (option, port) = ("--skip-inbound-ports".to_owned(), port.to_owned());
            Err(ArgumentError::InvalidPort { option, port })
        };
        assert_eq!(parse("init --skip-inbound-ports=22,http"), invalid("http"));
        assert_eq!(parse("init --skip-inbound-ports=65536"), invalid("65536"));
        assert_eq!(parse("init --skip-inbound-ports="), invalid(""));
        assert_eq!(
            parse("init --skip-inbound-ports"),
            Err(ArgumentError::NoValue("--skip-inbound-ports".to_owned()))
        );
        assert_eq!(parse("init --skip-ports=22"), unexpected("--skip-ports=22"));
        assert_eq!(parse("init --preserve-source-address=no"), unexpected("--preserve-source-address=no"));
        assert_eq!(parse("proxy --workers=2"), unexpected("--workers=2"));
        assert_eq!(parse("run"), unexpected("run"));
        assert_eq!(parse(""), Err(ArgumentError::NoCommand));
    }

    #[test]
    fn help_names_every_option_and_is_given_wherever_it_is_asked_for() {
        for line in ["--help", "-h", "help", "init --help", "proxy --help"] {
            assert_eq!(parse(line), Ok(Command::Help), "{line}");
        }
        assert_eq!(parse("--version"), Ok(Command::Version));
        for option in ["--skip-inbound-ports", "--skip-outbound-ports", "--preserve-source-address"] {
            assert!(USAGE.contains(option), "{option}");
        }
    }
}
