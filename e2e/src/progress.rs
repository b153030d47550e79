//! Progress output of xtask.
//!
//! Prints a line per step with the time since the start, and the state of the running tasks: on a terminal in one line
//! that is redrawn every second, elsewhere (CI, a file) in a line every 30 seconds.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

static START: OnceLock<Instant> = OnceLock::new();
static BOARD: Mutex<Board> = Mutex::new(Board { tasks: Vec::new(), next: 0, ticking: false, drawn: false });

/// Interval of progress lines where standard error is not a terminal.
const REPORT_EVERY: Duration = Duration::from_secs(30);

/// The running tasks, and the state of the progress line.
struct Board {
    tasks: Vec<(u64, String, String)>,
    next: u64,
    ticking: bool,
    drawn: bool,
}

/// A running task; it is shown until it is dropped.
pub struct Task {
    id: u64,
    name: String,
    since: Instant,
    announced: bool,
}

/// Starts the clock; later calls have no effect.
pub fn start() {
    START.get_or_init(Instant::now);
}

/// Prints the step that begins now.
pub fn step(what: &str) {
    line(&format!("[{}] {what}", clock()));
}

/// Prints a line to standard error, above the progress line.
fn line(text: &str) {
    let mut board = board();
    erase(&mut board);
    eprintln!("{text}");
}

/// Prints a line to standard output, above the progress line.
pub fn say(text: &str) {
    let mut board = board();
    erase(&mut board);
    println!("{text}");
}

/// Adds a task to the progress line.
pub fn task(name: &str) -> Task {
    step(name);
    let mut task = background(name);
    task.announced = true;
    task
}

/// Starts a task that is shown only while it runs.
pub fn background(name: &str) -> Task {
    let mut board = board();
    let id = board.next;
    board.next += 1;
    board.tasks.push((id, name.to_owned(), String::new()));
    if !board.ticking {
        board.ticking = true;
        thread::spawn(tick);
    }
    Task { id, name: name.to_owned(), since: Instant::now(), announced: false }
}

impl Task {
    /// Sets the state of the task, such as `812 of 1904 packages`.
    pub fn report(&self, state: &str) {
        if let Some(task) = board().tasks.iter_mut().find(|(id, ..)| *id == self.id) {
            state.clone_into(&mut task.2);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        board().tasks.retain(|(id, ..)| *id != self.id);
        let seconds = self.since.elapsed().as_secs();
        if self.announced && seconds > 0 {
            step(&format!("{}: {} min {:02} s", self.name, seconds / 60, seconds % 60));
        }
    }
}

/// Prints the progress as long as tasks are running.
fn tick() {
    let terminal = std::io::stderr().is_terminal();
    let mut reported = Instant::now();
    loop {
        thread::sleep(Duration::from_millis(if terminal { 1000 } else { 250 }));
        let mut board = board();
        if board.tasks.is_empty() {
            erase(&mut board);
            board.ticking = false;
            return;
        }
        let states: Vec<String> = board
            .tasks
            .iter()
            .map(|(_, name, state)| if state.is_empty() { name.clone() } else { format!("{name}: {state}") })
            .collect();
        let text = format!("[{}] {}", clock(), states.join(" | "));
        if terminal {
            let columns = columns();
            let text: String = text.chars().take(columns.saturating_sub(1)).collect();
            eprint!("\r\x1b[K{text}");
            std::io::stderr().flush().ok();
            board.drawn = true;
        } else if reported.elapsed() >= REPORT_EVERY {
            reported = Instant::now();
            eprintln!("{text}");
        }
    }
}

fn erase(board: &mut Board) {
    if std::mem::take(&mut board.drawn) {
        eprint!("\r\x1b[K");
    }
}

/// The width of the terminal.
fn columns() -> usize {
    rustix::termios::tcgetwinsize(std::io::stderr()).map_or(80, |size| usize::from(size.ws_col).max(20))
}

fn clock() -> String {
    let elapsed = START.get_or_init(Instant::now).elapsed().as_secs();
    format!("{:02}:{:02}", elapsed / 60, elapsed % 60)
}

fn board() -> MutexGuard<'static, Board> {
    BOARD.lock().unwrap_or_else(PoisonError::into_inner)
}
