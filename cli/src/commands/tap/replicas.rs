//! Streams from every replica of the operator, as one. A replica shows what the sidecars have seen that are connected to
//! it, so that one that goes away is opened again, and one that comes is opened too.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tulle_mesh::query::{Paths, Tap};

use super::Parameters;
use crate::cluster::operator::Opened;
use crate::cluster::{Context, Operator};
use crate::exit::{self, CliError};

/// How long a token holds: longer than the operator lets a tap run.
const LIFETIME: Duration = Duration::from_secs(3_900);
/// How often replicas are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// The operator sends a line every second. A stream without one for this long is broken.
const SILENT: Duration = Duration::from_secs(15);
/// How often in a row nothing can be opened, while nothing is open, before this is given up: about a minute.
const MAX_FAILURES: u32 = 6;
/// Lines that wait to be printed. More wait at the operator, which counts those that find no room.
const ROOM: usize = 256;

/// What a replica has said.
pub(super) enum Heard {
    /// A line.
    Line(Tap),
    /// All replicas have begun, and no sidecar is connected to any of them.
    NobodyThere,
}

/// What the task of a stream says.
enum Said {
    Line(Tap),
    /// The operator refuses.
    Refused(CliError),
    /// The stream has ended, or could not be opened.
    Ended(CliError),
}

/// Something that a replica's task says.
struct Message {
    pod: String,
    said: Said,
}

/// The streams.
pub(super) struct Replicas<'a> {
    context: &'a Context,
    parameters: Parameters,
    sender: mpsc::Sender<Message>,
    messages: mpsc::Receiver<Message>,
    /// Ended with this.
    tasks: JoinSet<()>,
    state: State,
    look_at: Instant,
}

/// Which streams there are. Pure.
#[derive(Debug, Default)]
struct State {
    /// Pods with a stream, and whether it has begun.
    open: HashMap<String, bool>,
    /// Some stream has begun once.
    has_begun: bool,
    /// Sidecars of those that have begun.
    sidecars: u64,
    /// It has been said that there are none.
    is_nobody: bool,
    /// Failures since a stream has begun: how long to wait.
    failures: u32,
    /// Failures in a row while no stream was open that has begun: when to give up.
    failures_alone: u32,
    /// What has been said about pods.
    noted: HashMap<String, CliError>,
}

impl State {
    /// A stream has begun. Returns whether it is to be said that no sidecar is there.
    fn begun(&mut self, pod: &str, sidecars: u64) -> bool {
        self.open.insert(pod.to_owned(), true);
        self.has_begun = true;
        self.failures = 0;
        self.failures_alone = 0;
        self.noted.remove(pod);
        self.sidecars = self.sidecars.saturating_add(sidecars);
        let nobody = self.sidecars == 0 && !self.is_nobody && self.open.values().all(|begun| *begun);
        self.is_nobody |= nobody;
        nobody
    }

    /// A stream has ended, or could not be opened. Returns what is to be said about it, and `Err` where it is no use to go
    /// on.
    fn ended(&mut self, pod: &str, error: CliError) -> Result<Option<String>, CliError> {
        self.open.remove(pod);
        // While some replica shows requests, another that cannot be opened is no reason to give up.
        let shows = self.open.values().any(|begun| *begun);
        self.failures_alone = if shows { 0 } else { self.failures_alone + 1 };
        self.failures = if shows { self.failures + 1 } else { self.failures_alone };
        if self.open.is_empty() && (!self.has_begun || self.failures_alone > MAX_FAILURES) {
            return Err(error);
        }
        let is_known = self.noted.get(pod) == Some(&error);
        let line = format!("note: {error}; it is opened again if it can be");
        self.noted.insert(pod.to_owned(), error);
        Ok((!is_known).then_some(line))
    }

    /// A replica refuses before any stream has begun: another may serve it, since it may have fewer taps or sidecars. If it
    /// refuses again later, that is said.
    fn refused(&mut self, pod: &str, error: CliError) -> Result<(), CliError> {
        self.open.remove(pod);
        if self.open.is_empty() { Err(error) } else { Ok(()) }
    }

    /// How long to wait before streams are opened again.
    fn pause(&self) -> Duration {
        Duration::from_secs(1 << self.failures.min(4)).min(LOOK_EVERY)
    }
}

impl<'a> Replicas<'a> {
    /// Nothing is opened yet.
    pub(super) fn new(context: &'a Context, parameters: Parameters) -> Self {
        let (sender, messages) = mpsc::channel(ROOM);
        Self {
            context,
            parameters,
            sender,
            messages,
            tasks: JoinSet::new(),
            state: State::default(),
            look_at: Instant::now(),
        }
    }

    /// What some replica says next.
    ///
    /// # Errors
    /// The operator refuses, or no replica can be reached any more.
    pub(super) async fn next(&mut self) -> Result<Heard, CliError> {
        loop {
            tokio::select! {
                Some(message) = self.messages.recv() => {
                    if let Some(heard) = self.heard(message)? {
                        return Ok(heard);
                    }
                }
                () = sleep_until(self.look_at) => {
                    self.look_at = Instant::now() + LOOK_EVERY;
                    match self.look().await {
                        Err(error) if !self.state.has_begun => return Err(error),
                        Err(error) => self.ended("", error)?,
                        Ok(()) => {}
                    }
                }
            }
        }
    }

    fn heard(&mut self, message: Message) -> Result<Option<Heard>, CliError> {
        let Message { pod, said } = message;
        match said {
            Said::Refused(error) if !self.state.has_begun => self.state.refused(&pod, error).map(|()| None),
            Said::Refused(error) | Said::Ended(error) => self.ended(&pod, error).map(|()| None),
            Said::Line(Tap::Started { sidecars, unable }) => {
                let nobody = self.state.begun(&pod, sidecars) && unable.is_empty();
                let started = Heard::Line(Tap::Started { sidecars, unable });
                Ok(Some(if nobody { Heard::NobodyThere } else { started }))
            }
            Said::Line(line) => Ok(Some(Heard::Line(line))),
        }
    }

    fn ended(&mut self, pod: &str, error: CliError) -> Result<(), CliError> {
        if let Some(line) = self.state.ended(pod, error)? {
            exit::note(&crate::output::plain(&line));
        }
        self.look_at = self.look_at.min(Instant::now() + self.state.pause());
        Ok(())
    }

    /// Opens a stream at every replica that has none.
    async fn look(&mut self) -> Result<(), CliError> {
        // Their tasks have said so before they ended.
        while self.tasks.try_join_next().is_some() {}
        let found = self.context.replicas().await?;
        let (are_all, replicas) = (found.are_all, found.into_all());
        let is_first = !self.state.has_begun && self.state.open.is_empty();
        if is_first && !are_all {
            exit::note(
                "note: you may not list the operator's pods: only sidecars that are connected to its leader are seen",
            );
        }
        let pods: HashSet<&String> = replicas.iter().map(|at| &at.pod).collect();
        self.state.noted.retain(|pod, _| pods.contains(pod));
        let new: Vec<_> = replicas.into_iter().filter(|at| !self.state.open.contains_key(&at.pod)).collect();
        let Some(first) = new.first() else { return Ok(()) };
        let token = self.context.token(first, LIFETIME).await?;
        let client = self.context.streams().await?;
        for at in new {
            let pod = at.pod.clone();
            self.state.open.insert(pod.clone(), false);
            let operator = Operator::new(client.clone(), at, token.clone());
            self.tasks.spawn(read(pod, operator, self.parameters.clone(), self.sender.clone()));
        }
        Ok(())
    }
}

/// Passes on what a replica says, to its end.
async fn read(pod: String, operator: Operator, parameters: Parameters, sender: mpsc::Sender<Message>) {
    let last = lines(&pod, &operator, &parameters, &sender).await;
    // Nobody listens where the command has ended.
    let _ = sender.send(Message { pod, said: last }).await;
}

/// Passes on lines. Returns why there are no more.
async fn lines(
    pod: &str,
    operator: &Operator,
    parameters: &Parameters,
    sender: &mpsc::Sender<Message>,
) -> Said {
    let parameters: Vec<(&str, &str)> =
        parameters.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut lines = match operator.lines(Paths::TAP, &parameters).await {
        Ok(Opened::Lines(lines)) => lines,
        Ok(Opened::Refused(error)) => return Said::Refused(error),
        Err(error) => return Said::Ended(error),
    };
    loop {
        let line = match timeout(SILENT, lines.next()).await {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => {
                return Said::Ended(CliError::failed(format!("the stream of pod {pod} has ended")));
            }
            Ok(Err(error)) => return Said::Ended(error),
            Err(_) => {
                let what = format!("pod {pod} has sent nothing for {} s", SILENT.as_secs());
                return Said::Ended(CliError::failed(what));
            }
        };
        // A newer operator may have kinds of lines that this program does not know.
        let Ok(line) = serde_json::from_slice::<Tap>(&line) else { continue };
        let message = Message { pod: pod.to_owned(), said: Said::Line(line) };
        if sender.send(message).await.is_err() {
            return Said::Ended(CliError::Closed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(pods: &[&str]) -> State {
        let open = pods.iter().map(|pod| ((*pod).to_owned(), false)).collect();
        State { open, ..State::default() }
    }

    fn gone() -> CliError {
        CliError::failed("gone")
    }

    #[test]
    fn what_fails_before_anything_has_begun_ends_the_command_with_the_last_replica() {
        let mut state = open(&["a", "b"]);
        assert!(state.ended("a", gone()).unwrap().is_some());
        assert_eq!(state.ended("b", gone()), Err(gone()));
    }

    #[test]
    fn a_replica_that_goes_away_is_said_once_and_again_when_it_was_back() {
        let mut state = open(&["a", "b"]);
        state.begun("a", 1);
        state.begun("b", 1);
        let mut said = || state.ended("b", gone()).unwrap().is_some();
        assert!(said());
        assert!(!said(), "it could not be opened again, which is no news");
        state.begun("b", 1);
        assert!(state.ended("b", gone()).unwrap().is_some());
    }

    #[test]
    fn a_replica_that_cannot_be_opened_does_not_use_up_the_tries_while_another_shows_requests() {
        let mut state = open(&["a", "b"]);
        state.begun("a", 1);
        for _ in 0..=MAX_FAILURES {
            assert!(state.ended("b", gone()).is_ok());
        }
        assert!(state.ended("a", gone()).is_ok(), "this is the first failure without any stream");
        assert_eq!(state.pause().as_secs(), 2);
    }

    #[test]
    fn a_refusal_by_one_replica_ends_the_command_only_when_no_other_stream_is_open() {
        let mut state = open(&["a", "b"]);
        let refused = CliError::failed("16 taps run");
        assert_eq!(state.refused("a", refused.clone()), Ok(()), "b may serve it");
        assert_eq!(state.refused("b", refused.clone()), Err(refused.clone()));
        let mut state = open(&["a", "b"]);
        assert_eq!(state.refused("a", refused.clone()), Ok(()));
        state.begun("b", 1);
        let said = state.ended("a", refused).unwrap();
        assert!(said.is_some_and(|line| line.contains("16 taps run")), "the sidecars of a are missing");
    }

    #[test]
    fn without_any_stream_it_is_given_up_after_some_tries_and_pauses_grow() {
        let mut state = open(&["a"]);
        state.begun("a", 1);
        let mut pauses = Vec::new();
        for _ in 0..MAX_FAILURES {
            assert!(state.ended("a", gone()).is_ok());
            pauses.push(state.pause().as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 15, 15, 15]);
        assert_eq!(state.ended("a", gone()), Err(gone()));
        state.begun("a", 1);
        assert!(state.ended("a", gone()).is_ok(), "a stream that has begun starts the count anew");
    }

    #[test]
    fn that_no_sidecar_is_there_is_said_once_and_when_all_replicas_have_begun() {
        let mut state = open(&["a", "b"]);
        assert!(!state.begun("a", 0), "b may have one");
        assert!(state.begun("b", 0));
        assert!(!state.begun("b", 0), "it was said before");
        let mut state = open(&["a", "b"]);
        state.begun("a", 1);
        assert!(!state.begun("b", 0));
    }
}
