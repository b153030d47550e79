//! What is around every view: head, landmarks, navigation, and the commands that show the same.

use maud::{DOCTYPE, Markup, html};

use super::words::{Window, duration};

/// A view that the navigation leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// The ranking, and the pages of workloads.
    Workloads,
    /// The Canaries.
    Canaries,
    /// The state of the mesh.
    Health,
}

impl View {
    const ALL: [Self; 3] = [Self::Workloads, Self::Canaries, Self::Health];

    fn name(self) -> &'static str {
        match self {
            Self::Workloads => "Workloads",
            Self::Canaries => "Canaries",
            Self::Health => "Mesh health",
        }
    }

    fn address(self) -> &'static str {
        match self {
            Self::Workloads => "/",
            Self::Canaries => "/canaries",
            Self::Health => "/health",
        }
    }
}

/// What differs around the views.
#[derive(Clone, Debug)]
pub struct Page<'a> {
    /// The heading.
    pub title: &'a str,
    /// Where it belongs; `None`: outside the navigation, such as an error.
    pub view: Option<View>,
    /// Its address, for the link that loads it again.
    pub here: &'a str,
    /// The namespace that the token shows; `None`: all.
    pub only: Option<&'a str>,
    /// Commands that show the same.
    pub commands: Vec<String>,
}

/// A whole page. `controls` stays as it is when the script loads `live` again.
pub fn page(page: &Page<'_>, controls: &Markup, live: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (page.title) " · Tulle" }
                link rel="icon" href="data:,";
                link rel="stylesheet" href="/assets/page.css";
                script src="/assets/page.js" defer {}
            }
            body {
                a.skip href="#main" { "Skip to content" }
                header {
                    (navigation(page))
                }
                main id="main" tabindex="-1" {
                    h1 { (page.title) }
                    (controls)
                    div id="live" { (live) }
                    @if !page.commands.is_empty() { (commands(&page.commands)) }
                }
                footer {
                    p {
                        @match page.only {
                            Some(namespace) => {
                                "This page shows namespace " strong { (namespace) }
                                ". For every namespace, run " code { "tulle dashboard -A" } "."
                            }
                            None => "Served by the operator, which changes nothing for this page.",
                        }
                    }
                }
            }
        }
    }
}

fn navigation(page: &Page<'_>) -> Markup {
    html! {
        a.brand href="/" { "Tulle" }
        @if page.view.is_some() {
            nav aria-label="Views" {
                ul {
                    @for view in View::ALL {
                        li {
                            a href=(view.address()) aria-current=[(page.view == Some(view)).then_some("page")] {
                                (view.name())
                            }
                        }
                    }
                }
            }
            p.tools {
                a id="refresh" href=(page.here) { "Refresh" }
                // Shown by the script, which does what it stops.
                button id="pause" type="button" hidden { "Pause updates" }
                span id="updated" {}
            }
        }
    }
}

fn commands(commands: &[String]) -> Markup {
    html! {
        section.commands aria-labelledby="commands" {
            h2 id="commands" { "The same in a terminal" }
            ul {
                @for command in commands { li { code { (command) } } }
            }
        }
    }
}

/// A choice of the window, and of `fields` before it, as a form that works without a script.
pub fn form(action: &str, window: Window, fields: &Markup) -> Markup {
    html! {
        form.controls method="get" action=(action) {
            (fields)
            label for="window" { "Window" }
            select id="window" name="window" {
                @for choice in Window::ALL {
                    option value=(choice.name()) selected[choice == window] { (choice.name()) }
                }
            }
            button type="submit" { "Show" }
        }
    }
}

/// The head of a table whose columns need no explanation.
pub fn columns(names: &[&str]) -> Markup {
    html! {
        thead { tr { @for name in names { th scope="col" { (name) } } } }
    }
}

/// What a reader must know of the numbers of a window: `covered` seconds of it are known, `lost` reports are missing.
pub fn notes(window: Window, covered: u64, lost: u64) -> Markup {
    html! {
        @if covered < window.seconds() {
            p.note {
                "The history began " (duration(covered)) " ago, so these numbers cover less than "
                (window.name()) "."
            }
        }
        @if lost > 0 {
            p.note {
                @if lost == 1 { "One report of a sidecar in this window is" }
                @else { (lost) " reports of sidecars in this window are" }
                " lost; their counts are missing."
            }
        }
    }
}

/// A page about something that could not be shown.
pub fn message(title: &str, text: &str, hint: Option<&str>) -> Markup {
    let around = Page { title, view: None, here: "/", only: None, commands: Vec::new() };
    let live = html! {
        p { (text) }
        @if let Some(hint) = hint { pre { code { (hint) } } }
    };
    page(&around, &html! {}, &live)
}

/// What somebody sees whose request has no valid token. `tulle dashboard` adds one to every request.
pub fn no_token(why: &str) -> Markup {
    message("No token", &format!("{why} Open the page with this command:"), Some("tulle dashboard"))
}
