//! Pages of the documentation that are generated from this crate, and compared with what is checked in.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::args;
use crate::exit::CODES;

const COMMANDS: &str = "\
# Commands

What `tulle COMMAND -h` prints; `--help` has more about some options. The global options stand below `tulle` only.
[cli/README.md](../../../cli/README.md) describes them, and the rights that a user needs. Generated from
[args.rs](../../../cli/src/args.rs): `TULLE_UPDATE=1 cargo test -p tulle-cli reference`.
";

const EXIT_CODES: &str = "\
# Exit codes

Every command of `tulle` ends with one of these. What counts as a finding is said in
[checks](checks.md) and [lint](lint.md); `tulle explain` ends with 3 if the request does not arrive, `tulle diff` if
something would be denied and `--fail-on` says so. Generated from [exit.rs](../../../cli/src/exit.rs):
`TULLE_UPDATE=1 cargo test -p tulle-cli reference`.

| code | meaning |
|---|---|
";

/// Compares a page with the one that is checked in, or writes it where `TULLE_UPDATE` is set.
pub(crate) fn compare(name: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/reference").join(name);
    if std::env::var_os("TULLE_UPDATE").is_some() {
        fs::write(&path, page).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(checked_in == page, "{name} is stale: TULLE_UPDATE=1 cargo test -p tulle-cli reference");
}

/// A text of help without the options that every command has.
fn without_global(help: &str) -> String {
    let Some((before, rest)) = help.split_once("\n\nGlobal options:\n") else { return help.to_owned() };
    match rest.split_once("\n\n") {
        Some((_, after)) => format!("{before}\n\n{after}"),
        None => before.to_owned(),
    }
}

/// A section for a command, and for each below it.
fn section(command: &clap::Command, page: &mut String) {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let help = command.clone().render_help().to_string();
    // The help of the program itself has them.
    let help = if name.contains(' ') { without_global(&help) } else { help };
    let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
    write!(page, "\n## {name}\n\n```text\n{}\n```\n", lines.join("\n")).unwrap();
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        section(below, page);
    }
}

#[test]
fn the_page_of_commands_is_what_clap_knows() {
    let mut command = args::command(false);
    command.build();
    let mut page = COMMANDS.to_owned();
    section(&command, &mut page);
    compare("commands.md", &page);
}

#[test]
fn the_page_of_exit_codes_has_all_of_them() {
    let rows = CODES.iter().map(|row| format!("| {} | {} |\n", row.code, row.meaning));
    compare("exit-codes.md", &(EXIT_CODES.to_owned() + &rows.collect::<String>()));
}
