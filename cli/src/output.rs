//! What commands print on standard output: tables, JSON, YAML, names.
//!
//! Tables look like kubectl's: upper-case headers, columns three spaces apart, `-` for what is unknown.

use std::ffi::OsStr;
use std::fmt::{self, Display, Formatter};
use std::io::{ErrorKind, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::exit::CliError;

#[cfg(test)]
mod tests;

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    Table,
    /// A table with more columns.
    Wide,
    /// The whole result as JSON.
    Json,
    /// The whole result as YAML.
    Yaml,
    /// Names only, one in a line.
    Name,
}

/// Colours of text on a terminal. No state is shown by a colour alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Failures.
    Red,
    /// Warnings.
    Yellow,
    /// What is fine.
    Green,
}

/// How this command prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// The format.
    pub format: Format,
    /// Whether tables have headers.
    pub headers: bool,
    /// Whether text may be coloured.
    pub colour: bool,
    /// Whether standard output is a terminal, where a long name would push the other columns out of sight.
    pub terminal: bool,
}

impl Default for Output {
    fn default() -> Self {
        Self { format: Format::Table, headers: true, colour: false, terminal: false }
    }
}

impl Output {
    /// Prints a result. `table` gets whether the table is wide.
    ///
    /// # Errors
    /// The result has no JSON form, or standard output cannot be written.
    pub fn print<T: Serialize>(&self, value: &T, table: impl FnOnce(bool) -> Table) -> Result<(), CliError> {
        write(&self.text(value, table)?)
    }

    /// What [`Output::print`] prints.
    ///
    /// # Errors
    /// The result has no JSON form.
    pub fn text<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(bool) -> Table,
    ) -> Result<String, CliError> {
        match self.format {
            Format::Table | Format::Wide => {
                let mut table = table(self.format == Format::Wide);
                // Programs read what is piped. `-o wide` asks for everything.
                if self.terminal && self.format == Format::Table {
                    table.shorten();
                }
                Ok(if self.headers { table.to_string() } else { table.body() })
            }
            Format::Json => match serde_json::to_string_pretty(value) {
                Ok(text) => Ok(text + "\n"),
                Err(error) => Err(CliError::failed(format!("the result has no JSON form: {error}"))),
            },
            Format::Yaml => match crate::yaml::to_string(value) {
                Ok(text) => Ok(text),
                Err(error) => Err(CliError::failed(format!("the result has no YAML form: {error}"))),
            },
            Format::Name => Ok(table(false).names()),
        }
    }

    /// Whether people read this: a table on a terminal.
    pub fn is_interactive(&self) -> bool {
        matches!(self.format, Format::Table | Format::Wide) && std::io::stdout().is_terminal()
    }

    /// The text in a colour, if colours are wanted.
    pub fn paint(&self, colour: Colour, text: &str) -> String {
        let text = plain_lines(text);
        if !self.colour {
            return text;
        }
        let code = match colour {
            Colour::Red => 31,
            Colour::Yellow => 33,
            Colour::Green => 32,
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// Whether text is coloured: on a terminal, unless `--no-color` or a `NO_COLOR` that is not empty forbids it
/// (<https://no-color.org>), or the terminal cannot.
pub fn coloured(forbidden: bool, no_color: Option<&OsStr>, term: Option<&OsStr>, terminal: bool) -> bool {
    terminal && !forbidden && no_color.is_none_or(OsStr::is_empty) && term.is_none_or(|term| term != "dumb")
}

/// Text from elsewhere, for a terminal: names and messages of a cluster may hold characters that move the cursor, set the
/// title or hide what follows. Each becomes U+FFFD.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|character| if is_unsafe(character) { char::REPLACEMENT_CHARACTER } else { character })
        .collect()
}

/// The same of text with lines.
pub fn plain_lines(text: &str) -> String {
    let plain = |character: char| {
        if character != '\n' && is_unsafe(character) { char::REPLACEMENT_CHARACTER } else { character }
    };
    text.chars().map(plain).collect()
}

/// Control characters, and those that change the direction of writing.
fn is_unsafe(character: char) -> bool {
    character.is_control() || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The colours that [`Output::paint`] writes.
const ESCAPES: [&str; 4] = ["\u{1b}[31m", "\u{1b}[32m", "\u{1b}[33m", "\u{1b}[0m"];

/// A cell without control characters, but with our own colours. What comes from elsewhere is painted by
/// [`Output::paint`], which takes its control characters out; a cell that brings a colour of ours itself is painted
/// wrongly and does nothing else.
pub fn cell(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        if let Some(escape) = ESCAPES.iter().find(|escape| rest.starts_with(**escape)) {
            result.push_str(escape);
            rest = rest.strip_prefix(*escape).unwrap_or_default();
            continue;
        }
        result.push(if is_unsafe(character) { char::REPLACEMENT_CHARACTER } else { character });
        rest = rest.strip_prefix(character).unwrap_or_default();
    }
    result
}

/// Writes text on standard output.
///
/// # Errors
/// [`CliError::Closed`] if nobody reads it any more; or it cannot be written.
pub fn write(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(CliError::Closed),
        Err(error) => Err(CliError::failed(format!("cannot write to standard output: {error}"))),
    }
}

/// Characters of a cell of a table on a terminal. Names of most kinds have 63 at most, those of pods 253.
const WIDEST: usize = 63;
/// How many of these characters are the end of the cell. The others are its beginning.
const KEPT_END: usize = 20;

/// Rows under headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// One for each column.
    pub headers: Vec<&'static str>,
    /// Cells in the order of the headers.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// The rows without the headers.
    pub fn body(&self) -> String {
        let widths = self.widths(false);
        self.rows.iter().map(|row| line(row, &widths)).collect()
    }

    /// One name per row: the column NAME, or the first where there is none, after that of NAMESPACE if there is one.
    pub fn names(&self) -> String {
        let column = |name: &str| self.headers.iter().position(|header| *header == name);
        let first = || self.headers.iter().position(|header| *header != "NAMESPACE");
        let (namespace, name) = (column("NAMESPACE"), column("NAME").or_else(first).unwrap_or(0));
        let mut names = String::new();
        for row in &self.rows {
            if let Some(namespace) = namespace.filter(|index| *index != name).and_then(|index| row.get(index))
            {
                names.push_str(&plain(namespace));
                names.push('/');
            }
            names.push_str(&plain(row.get(name).map_or("", String::as_str)));
            names.push('\n');
        }
        names
    }

    /// Cuts long cells to [`WIDEST`] characters, but not the last of a row, which nothing is aligned with. The end stays:
    /// it tells one pod from another.
    fn shorten(&mut self) {
        for row in &mut self.rows {
            let aligned = row.len().saturating_sub(1);
            for cell in row.iter_mut().take(aligned).filter(|cell| !cell.contains('\u{1b}')) {
                let count = cell.chars().count();
                if count > WIDEST {
                    let start = cell.chars().take(WIDEST - KEPT_END - 1);
                    *cell = start.chain(['…']).chain(cell.chars().skip(count - KEPT_END)).collect();
                }
            }
        }
    }

    fn widths(&self, headers: bool) -> Vec<usize> {
        let mut widths = vec![0; self.headers.len()];
        if headers {
            for (widest, header) in widths.iter_mut().zip(&self.headers) {
                *widest = width(header);
            }
        }
        for row in &self.rows {
            for (widest, text) in widths.iter_mut().zip(row) {
                *widest = (*widest).max(width(&cell(text)));
            }
        }
        widths
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let widths = self.widths(true);
        f.write_str(&line(&self.headers, &widths))?;
        self.rows.iter().try_for_each(|row| f.write_str(&line(row, &widths)))
    }
}

/// A line of a table. Its last cell is not padded.
pub(crate) fn line<S: AsRef<str>>(cells: &[S], widths: &[usize]) -> String {
    let mut line = String::new();
    for (index, (text, widest)) in cells.iter().zip(widths).enumerate() {
        let text = cell(text.as_ref());
        line.push_str(&text);
        if index + 1 < cells.len() {
            line.extend(std::iter::repeat_n(' ', widest.saturating_sub(width(&text)) + 3));
        }
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

/// How many characters a terminal shows: all but those of colours.
fn width(text: &str) -> usize {
    let mut shown = 0;
    let mut escaped = false;
    for character in text.chars() {
        match character {
            '\u{1b}' => escaped = true,
            'm' if escaped => escaped = false,
            _ if escaped => {}
            _ => shown += 1,
        }
    }
    shown
}
