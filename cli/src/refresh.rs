//! Commands that draw again and again: `-w`, and `top`.
//!
//! On a terminal a frame replaces the one before. Elsewhere frames follow each other, so that a file or a pipe gets all
//! of them. Ctrl-C ends it without an error.

use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::{Context, Operator, TOKEN_LIFETIME};
use crate::exit::{self, CliError};
use crate::output::{self, Output};

/// Time between two frames.
const EVERY: Duration = Duration::from_secs(2);

/// What a command shows at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// The result, for standard output.
    pub text: String,
    /// What its reader must know about it, for standard error.
    pub notes: Vec<String>,
}

/// Draws once, or every two seconds until Ctrl-C. An error ends it only if nothing has been drawn yet: later, the
/// operator may be changing its leader.
///
/// # Errors
/// Those of `draw`, or of finding the operator.
pub async fn show(
    context: &Context,
    again: bool,
    mut draw: impl AsyncFnMut(&Operator) -> Result<Frame, CliError>,
) -> Result<(), CliError> {
    let mut live = Live { context, operator: None };
    let first = draw(live.operator().await?).await?;
    if !again {
        return once(&first);
    }
    let screen = context.output.is_interactive();
    print(&context.output, &first, screen)?;
    loop {
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => {
                return interrupted.map_err(|error| CliError::failed(format!("cannot wait for Ctrl-C: {error}")));
            }
            () = tokio::time::sleep(EVERY) => {}
        }
        let next = tokio::select! {
            // The handler is installed by now, so an error would have been reported above.
            _ = tokio::signal::ctrl_c() => return Ok(()),
            next = async { draw(live.operator().await?).await } => next,
        };
        match next {
            Ok(frame) => print(&context.output, &frame, screen)?,
            Err(error) => {
                live.operator = None;
                error.print(&context.output);
            }
        }
    }
}

fn once(frame: &Frame) -> Result<(), CliError> {
    output::write(&frame.text)?;
    frame.notes.iter().for_each(|note| exit::note(&format!("note: {note}")));
    Ok(())
}

fn print(output: &Output, frame: &Frame, screen: bool) -> Result<(), CliError> {
    if screen {
        return replace(frame);
    }
    // An empty line parts tables; JSON and YAML documents have parts of their own.
    let separator = match output.format {
        output::Format::Yaml => "---\n",
        output::Format::Table | output::Format::Wide => "\n",
        output::Format::Json | output::Format::Name => "",
    };
    once(&Frame { text: format!("{}{separator}", frame.text), notes: frame.notes.clone() })
}

/// Draws a frame on a terminal, in place of the one before.
///
/// # Errors
/// Standard output is closed.
pub fn replace(frame: &Frame) -> Result<(), CliError> {
    output::write(&redraw(frame, height()))
}

/// The frame from the upper left corner on. Lines are cleared as they are written, so that the screen does not flicker.
fn redraw(frame: &Frame, height: Option<usize>) -> String {
    let mut text = String::from("\u{1b}[H");
    for line in fitted(&frame.text, &frame.notes, height) {
        text.push_str(&line);
        text.push_str("\u{1b}[K\n");
    }
    text.push_str("\u{1b}[J");
    text
}

/// The lines of a text and the notes below it, cut to the height of a terminal: a longer frame would scroll, and the next
/// one would not replace it.
fn fitted(text: &str, notes: &[String], height: Option<usize>) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    // The cursor stands in a line of its own.
    let room = height.map(|height| height.saturating_sub(1 + notes.len()).max(2));
    if let Some(room) = room.filter(|room| lines.len() > *room) {
        let more = lines.len() - (room - 1);
        lines.truncate(room - 1);
        lines.push(format!("… {more} more"));
    }
    lines.extend(notes.iter().map(|note| format!("note: {note}")));
    lines
}

/// The height of the terminal in lines, if standard output is one.
fn height() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some(usize::from(size.ws_row)).filter(|rows| *rows > 0)
}

/// The operator, found again when it did not answer or before the token ends.
struct Live<'a> {
    context: &'a Context,
    operator: Option<(Operator, Instant)>,
}

impl Live<'_> {
    async fn operator(&mut self) -> Result<&Operator, CliError> {
        if self.operator.as_ref().is_some_and(|(_, found)| found.elapsed() > TOKEN_LIFETIME / 2) {
            self.operator = None;
        }
        let found = match self.operator.take() {
            Some(found) => found,
            None => (self.context.operator().await?, Instant::now()),
        };
        Ok(&self.operator.insert(found).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_on_a_terminal_clears_what_the_one_before_left() {
        let frame = Frame { text: "NAME\nweb\n".into(), notes: vec!["2 reports were lost".into()] };
        let expected = "\u{1b}[HNAME\u{1b}[K\nweb\u{1b}[K\nnote: 2 reports were lost\u{1b}[K\n\u{1b}[J";
        assert_eq!(redraw(&frame, None), expected);
        assert_eq!(redraw(&frame, Some(24)), expected);
    }

    #[test]
    fn a_frame_that_is_higher_than_the_terminal_says_how_many_lines_are_left_out() {
        let text = "NAME\na\nb\nc\nd\n";
        assert_eq!(fitted(text, &[], Some(6)), ["NAME", "a", "b", "c", "d"]);
        assert_eq!(fitted(text, &[], Some(5)), ["NAME", "a", "b", "… 2 more"]);
        let notes = ["2 reports were lost".to_owned()];
        assert_eq!(fitted(text, &notes, Some(5)), ["NAME", "a", "… 3 more", "note: 2 reports were lost"]);
        assert_eq!(fitted(text, &[], Some(1)), ["NAME", "… 4 more"]);
    }
}
