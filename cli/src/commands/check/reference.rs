//! The page of the documentation that lists the checks.

use tulle_mesh::check::list::ALL;

use crate::reference::compare;

const INTRODUCTION: &str = "\
# Checks

What `tulle check` looks at, by the numbers that it prints. A number never gets another meaning. Each finding says what was
found, and the command that repairs it. Findings at or above `--fail-on` make the [exit code](exit-codes.md) 3; `--pre` carries
out only what matters before an installation. Generated from
[list.rs](../../../mesh/src/check/list.rs): `TULLE_UPDATE=1 cargo test -p tulle-cli reference`.

| id | about | what holds if all is well |
|---|---|---|
";

#[test]
fn the_page_of_checks_has_all_of_them() {
    let rows = ALL.iter().map(|check| format!("| {} | {} | {} |\n", check.id, check.category, check.title));
    compare("checks.md", &(INTRODUCTION.to_owned() + &rows.collect::<String>()));
}
