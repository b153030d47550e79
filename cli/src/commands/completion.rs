//! `tulle completion`: completion of commands and options, for a shell and for kubectl.

use clap::ValueEnum;
use clap_complete::Shell;

use crate::args;
use crate::cluster::Context;
use crate::exit::CliError;
use crate::output;

/// For whom completion is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Bash
    Bash,
    /// Zsh
    Zsh,
    /// Fish
    Fish,
    /// PowerShell
    Powershell,
}

/// Options of `tulle completion`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  source <(tulle completion bash)
  tulle completion zsh > \"${fpath[1]}/_tulle\"
  tulle completion fish > ~/.config/fish/completions/tulle.fish

For `kubectl tulle`, kubectl (1.26 or later) asks an executable `kubectl_complete-tulle` in PATH:
  #!/bin/sh
  exec tulle __complete \"$@\"")]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Target,
}

/// What kubectl passes: the words after `kubectl tulle`, of which the last is the one to complete.
#[derive(clap::Args)]
pub struct CompleteArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Runs `tulle completion`.
///
/// # Errors
/// Standard output cannot be written.
pub async fn run(_context: &Context, args: Args) -> Result<(), CliError> {
    let shell = match args.shell {
        Target::Bash => Shell::Bash,
        Target::Zsh => Shell::Zsh,
        Target::Fish => Shell::Fish,
        Target::Powershell => Shell::PowerShell,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(false), "tulle", &mut script);
    output::write(&String::from_utf8_lossy(&script))
}

/// Prints candidates as kubectl expects them: one in a line, then `:4`, which forbids names of files.
///
/// # Errors
/// Standard output cannot be written.
pub async fn complete(_context: &Context, args: CompleteArgs) -> Result<(), CliError> {
    let mut command = args::command(true);
    // Makes global options known to the commands below.
    command.build();
    let mut lines = candidates(&command, &args.words);
    lines.push(":4".to_owned());
    output::write(&(lines.join("\n") + "\n"))
}

/// Commands, options or values that may stand where the last word is.
fn candidates(command: &clap::Command, words: &[String]) -> Vec<String> {
    let (last, before) = match words.split_last() {
        Some((last, before)) => (last.as_str(), before),
        None => ("", words),
    };
    let mut command = command;
    for word in before {
        if let Some(inner) = command.find_subcommand(word) {
            command = inner;
        }
    }
    let option = before.last().and_then(|word| option(command, word));
    let mut found = Vec::new();
    if let Some(option) = option {
        found.extend(values(option));
    } else if last.starts_with('-') {
        let options = command.get_arguments().filter(|option| !option.is_hide_set());
        found.extend(options.filter_map(|option| Some(format!("--{}", option.get_long()?))));
    } else {
        let commands = command.get_subcommands().filter(|command| !command.is_hide_set());
        found.extend(commands.map(|command| command.get_name().to_owned()));
        found.extend(command.get_positionals().flat_map(values));
    }
    found.retain(|candidate| candidate.starts_with(last));
    found
}

/// The option that a word names, if a value follows it.
fn option<'a>(command: &'a clap::Command, word: &str) -> Option<&'a clap::Arg> {
    let named = |option: &&clap::Arg| match word.strip_prefix("--") {
        Some(long) => option.get_long() == Some(long),
        None => word
            .strip_prefix('-')
            .is_some_and(|short| option.get_short().map(String::from).as_deref() == Some(short)),
    };
    command.get_arguments().find(named).filter(|option| option.get_action().takes_values())
}

fn values(option: &clap::Arg) -> Vec<String> {
    let values = option.get_possible_values();
    values.iter().filter(|value| !value.is_hide_set()).map(|value| value.get_name().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(words: &[&str]) -> Vec<String> {
        let mut command = args::command(true);
        command.build();
        candidates(&command, &words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn commands_options_and_values_are_offered_where_they_may_stand() {
        assert!(offered(&[""]).contains(&"stat".to_owned()));
        assert_eq!(offered(&["das"]), ["dashboard"]);
        assert_eq!(offered(&["stat", "--win"]), ["--window"]);
        assert_eq!(offered(&["stat", "--name"]), ["--namespace"]);
        assert_eq!(offered(&["stat", "-o", "w"]), ["wide"]);
        assert_eq!(offered(&["completion", "z"]), ["zsh"]);
        assert!(offered(&["stat", "--watch", "--"]).contains(&"--from".to_owned()));
    }

    #[test]
    fn what_is_hidden_is_not_offered() {
        assert!(!offered(&[""]).contains(&"__complete".to_owned()));
    }

    #[test]
    fn every_shell_gets_a_script_that_knows_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut args::command(false), "tulle", &mut script);
            assert!(String::from_utf8(script).unwrap().contains("dashboard"), "{shell}");
        }
    }
}
