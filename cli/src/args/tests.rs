//! Every command's options, as users write them.

use super::*;

fn read(line: &str) -> Result<Cli, clap::Error> {
    parse(line.split(' ').map(OsString::from))
}

fn refusal(line: &str) -> String {
    read(line).err().unwrap_or_else(|| panic!("{line} is accepted")).to_string()
}

#[test]
fn the_definitions_of_all_commands_are_consistent() {
    command(false).debug_assert();
    command(true).debug_assert();
}

#[test]
fn global_options_may_follow_the_command() {
    let cli =
        read("tulle stat -n shop -o wide --no-headers --context kind --as jane --system-namespace mesh").ok();
    let global = cli.unwrap().global;
    assert_eq!(global.namespace.as_deref(), Some("shop"));
    assert_eq!(global.output, Format::Wide);
    assert!(global.no_headers && !global.all_namespaces && !global.no_color);
    assert_eq!(global.context.as_deref(), Some("kind"));
    assert_eq!(global.impersonate.as_deref(), Some("jane"));
    assert_eq!(global.system_namespace.as_deref(), Some("mesh"));
    assert!(read("tulle -A edges").ok().unwrap().global.all_namespaces);
}

#[test]
fn the_commands_of_this_table_are_read() {
    let lines = [
        "tulle stat",
        "tulle stat deploy/web --from shop/load --window 5m -w",
        "tulle stat svc web --to web",
        "tulle top --once --limit 5",
        "tulle edges --window 1h",
        "tulle routes",
        "tulle routes web",
        "tulle denials",
        "tulle denials deploy/web -n shop -o wide",
        "tulle -A denials shop/web -o name",
        "tulle tap",
        "tulle tap web --status 5xx --denied --slow 200ms -H user-agent --header x-id --rate 5 --max 3",
        "tulle tap deploy/web --to payments/checkout --method GET --path /cart/** --timeout 1m",
        "tulle tap --inbound --from load",
        "tulle dashboard --port 8080",
        "tulle dashboard --allow-actions",
        "tulle version --client",
        "tulle completion zsh",
        "tulle explain web cart",
        "tulle explain web cart POST /v1/x",
        "tulle explain web cart /v1/x -H x-id:1",
        "tulle install --dry-run server",
        "tulle upgrade --dry-run=client",
        "tulle upgrade --dry-run=server",
    ];
    for line in lines {
        assert!(read(line).is_ok(), "{line}: {}", refusal(line));
    }
}

#[test]
fn a_wrong_command_line_ends_with_the_code_for_usage() {
    for line in [
        "tulle",
        "tulle tap --rate 101",
        "tulle tap --max 0",
        "tulle tap --inbound --to web",
        "tulle tap --inbound --outbound",
        "tulle tap --from a --to b",
        "tulle stats",
        "tulle denials web cart",
        "tulle stat --window 60",
        "tulle stat -o xml",
        "tulle completion tcsh",
        "tulle explain web",
        "tulle explain web cart GET /v1/x more",
        "tulle explain web cart GET --method POST",
        "tulle explain web cart GET /v1/x --path /v1/y",
        "tulle explain web cart /v1/x --path /v1/y",
        "tulle explain web cart /v1/x GET",
        "tulle install --apply --dry-run server",
        "tulle upgrade --apply --dry-run client",
        "tulle upgrade --dry-run",
    ] {
        let error = read(line).err().unwrap();
        assert_eq!(error.exit_code(), 2, "{line}");
    }
    assert!(refusal("tulle stat --window 60").contains("with a unit"));
    assert!(refusal("tulle explain web cart GET --method POST").contains("the method is given twice"));
    assert!(refusal("tulle explain web cart /v1/x GET").contains("write METHOD PATH"));
    assert_eq!(read("tulle --help").err().unwrap().exit_code(), 0);
}

#[test]
fn the_program_names_itself_as_it_was_called() {
    let plugin = read("/usr/local/bin/kubectl-tulle stat --help").err().unwrap().to_string();
    assert!(plugin.contains("Usage: kubectl tulle stat"), "{plugin}");
    let plain = read("/usr/local/bin/tulle stat --help").err().unwrap().to_string();
    assert!(plain.contains("Usage: tulle stat"), "{plain}");
}

#[test]
fn help_has_the_table_of_exit_codes() {
    let help = read("tulle --help").err().unwrap().to_string();
    for row in exit::CODES {
        assert!(help.contains(row.meaning), "{help}");
    }
}

#[test]
fn commands_of_the_installation_take_the_namespace_of_tulle_and_no_other() {
    for line in ["tulle install -n mesh", "tulle -A upgrade", "tulle uninstall --apply -n mesh"] {
        assert_eq!(read(line).err().map(|error| error.exit_code()), Some(2), "{line}");
        assert!(refusal(line).contains("--system-namespace"), "{line}");
    }
    assert!(read("tulle uninstall --system-namespace mesh").is_ok());
}

#[test]
fn an_empty_namespace_is_a_wrong_command_line() {
    for option in ["-n", "--system-namespace"] {
        let words = ["tulle", "stat", option, ""].map(OsString::from);
        assert_eq!(parse(words).err().map(|error| error.exit_code()), Some(2), "{option}");
    }
}
