//! Golden tables, and the formats beside them.

use super::*;

#[derive(Serialize)]
struct Pods {
    pods: u32,
}

fn table(wide: bool) -> Table {
    let mut table = Table {
        headers: vec!["NAMESPACE", "NAME", "RPS"],
        rows: vec![
            vec!["shop".into(), "web".into(), "1.2k".into()],
            vec!["payments".into(), "checkout".into(), "-".into()],
        ],
    };
    if wide {
        table.headers.push("RETRIES");
        table.rows.iter_mut().for_each(|row| row.push("7".into()));
    }
    table
}

fn text(format: Format, headers: bool) -> String {
    Output { format, headers, ..Output::default() }.text(&Pods { pods: 2 }, table).unwrap()
}

#[test]
fn columns_are_three_spaces_apart_as_in_kubectl() {
    let expected = "\
NAMESPACE   NAME       RPS
shop        web        1.2k
payments    checkout   -
";
    assert_eq!(text(Format::Table, true), expected);
}

#[test]
fn a_wide_table_has_more_columns() {
    let expected = "\
NAMESPACE   NAME       RPS    RETRIES
shop        web        1.2k   7
payments    checkout   -      7
";
    assert_eq!(text(Format::Wide, true), expected);
}

#[test]
fn without_headers_columns_are_as_wide_as_their_cells() {
    assert_eq!(text(Format::Table, false), "shop       web        1.2k\npayments   checkout   -\n");
}

#[test]
fn other_formats_print_the_whole_result_and_names_their_namespace() {
    assert_eq!(text(Format::Json, true), "{\n  \"pods\": 2\n}\n");
    assert_eq!(text(Format::Yaml, true), "pods: 2\n");
    assert_eq!(text(Format::Name, true), "shop/web\npayments/checkout\n");
}

#[test]
fn the_first_column_is_the_name_where_no_column_is_called_so() {
    let table = Table { headers: vec!["SRC", "DST"], rows: vec![vec!["web".into(), "svc/db".into()]] };
    assert_eq!(table.names(), "web\n");
}

#[test]
fn a_coloured_cell_is_padded_by_what_is_shown_of_it() {
    let output = Output { colour: true, ..Output::default() };
    let red = output.paint(Colour::Red, "9%");
    assert_eq!(red, "\u{1b}[31m9%\u{1b}[0m");
    let table = Table { headers: vec!["SUCCESS", "P99"], rows: vec![vec![red.clone(), "1ms".into()]] };
    assert_eq!(table.to_string(), format!("SUCCESS   P99\n{red}        1ms\n"));
}

#[test]
fn a_row_that_ends_with_nothing_has_no_trailing_spaces() {
    let table = Table { headers: vec!["A", "B"], rows: vec![vec!["x".into(), String::new()]] };
    assert_eq!(table.to_string(), "A   B\nx\n");
}

#[test]
fn colours_need_a_terminal_and_nobody_who_forbids_them() {
    let set = |value: &'static str| Some(OsStr::new(value));
    assert!(coloured(false, None, set("xterm"), true));
    assert!(coloured(false, set(""), None, true), "an empty NO_COLOR counts as not set");
    assert!(!coloured(false, set("1"), set("xterm"), true));
    assert!(!coloured(true, None, set("xterm"), true));
    assert!(!coloured(false, None, set("dumb"), true));
    assert!(!coloured(false, None, set("xterm"), false));
}

#[test]
fn control_characters_of_a_cluster_do_not_reach_the_terminal() {
    let evil = "a\u{1b}]0;title\u{7}\u{9b}2J\r\nb\u{202e}";
    let table = Table { headers: vec!["NAME", "B"], rows: vec![vec![evil.into(), "x".into()]] };
    let shown = table.body();
    assert_eq!(shown, "a\u{fffd}]0;title\u{fffd}\u{fffd}2J\u{fffd}\u{fffd}b\u{fffd}   x\n");
    assert_eq!(table.to_string().lines().count(), 2, "a cell makes no line of its own");
    assert!(!table.names().contains('\u{1b}'));
    let output = Output { colour: true, ..Output::default() };
    let red = output.paint(Colour::Red, "a\u{1b}[2Jb");
    assert_eq!(red, "\u{1b}[31ma\u{fffd}[2Jb\u{1b}[0m");
    let table = Table { headers: vec!["A"], rows: vec![vec![red.clone()]] };
    assert_eq!(table.body(), format!("{red}\n"), "our own colours stay");
    assert_eq!(plain_lines("a\nb\tc"), "a\nb\u{fffd}c");
}

#[test]
fn long_names_are_cut_on_a_terminal_only() {
    let name = format!("{}-7d9f4c8b6-x2x7q", "a".repeat(120));
    let long =
        |_: bool| Table { headers: vec!["NAME", "WHY"], rows: vec![vec![name.clone(), "b".repeat(120)]] };
    let print = |format, terminal| {
        Output { format, terminal, ..Output::default() }.text(&Pods { pods: 1 }, long).unwrap()
    };
    let cut = print(Format::Table, true);
    let row = cut.lines().nth(1).unwrap();
    let (first, last) = row.split_once("   ").unwrap();
    assert_eq!((first.chars().count(), last.len()), (63, 120), "{row}");
    assert!(first.starts_with("aaa") && first.ends_with("…aaaa-7d9f4c8b6-x2x7q"), "{first}");
    for (format, terminal) in [(Format::Table, false), (Format::Wide, true), (Format::Name, true)] {
        assert!(print(format, terminal).contains(&name), "{format:?}");
    }
}
