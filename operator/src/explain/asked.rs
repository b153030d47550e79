//! A request as rules of routes and conditions of a Canary look at it.

use std::borrow::Cow;

use tulle_mesh::proto;
use tulle_mesh::proto::value_match::Type;
use tulle_mesh::route::Subject;

use super::Question;

/// A request as the matcher of sidecars sees it.
pub(super) struct Asked<'a> {
    question: &'a Question,
    path: &'a str,
    query: Option<&'a str>,
}

impl<'a> Asked<'a> {
    pub(super) fn of(question: &'a Question) -> Self {
        let (path, query) = match question.path.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (question.path.as_str(), None),
        };
        Self { question, path: if path.is_empty() { "/" } else { path }, query }
    }

    /// The host that it names, without port.
    pub(super) fn host(&self) -> Option<&'a str> {
        let mut headers = self.question.headers.iter();
        let (_, value) = headers.find(|(name, _)| name.eq_ignore_ascii_case("host"))?;
        Some(value.rsplit_once(':').map_or(value.as_str(), |(host, _)| host))
    }
}

impl Subject for Asked<'_> {
    fn method(&self) -> &str {
        &self.question.method
    }

    fn path(&self) -> &str {
        self.path
    }

    fn query(&self) -> Option<&str> {
        self.query
    }

    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let lines = self.question.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name));
        let values: Vec<&str> = lines.map(|(_, value)| value.as_str()).collect();
        let between = if name.eq_ignore_ascii_case("cookie") { "; " } else { "," };
        (!values.is_empty()).then(|| Cow::Owned(values.join(between).into_bytes()))
    }
}

/// As sidecars do: any line of a header, or any cookie, with exactly this value.
pub(super) fn steers(wanted: &proto::ValueMatch, question: &Question) -> bool {
    let lines = |name: &str| {
        let name = name.to_owned();
        question
            .headers
            .iter()
            .filter(move |(line, _)| line.eq_ignore_ascii_case(&name))
            .map(|(_, value)| value)
    };
    if wanted.r#type() != Type::Cookie {
        return lines(&wanted.name).any(|value| *value == wanted.value);
    }
    let mut cookies =
        lines("cookie").flat_map(|line| line.split(';')).filter_map(|pair| pair.split_once('='));
    cookies.any(|(name, value)| name.trim() == wanted.name && value.trim() == wanted.value)
}
