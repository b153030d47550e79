//! Kubernetes quantities of CPU and memory.

use std::fmt;

/// An amount of a resource, in thousandths of a core or of a byte.
///
/// The syntax is that of Kubernetes' `resource.Quantity`: a decimal number with a suffix such as `m`, `Mi` or `G`, or
/// with an exponent. Fractions of a thousandth are rounded up, as the API server does for CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(i128);

/// Suffixes, in billionths of a unit.
const SUFFIXES: [(&str, i128); 16] = [
    ("n", 1),
    ("u", 1_000),
    ("m", 1_000_000),
    ("", 1_000_000_000),
    ("k", 1_000_000_000_000),
    ("M", 1_000_000_000_000_000),
    ("G", 1_000_000_000_000_000_000),
    ("T", 1_000_000_000_000_000_000_000),
    ("P", 1_000_000_000_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000_000_000_000),
    ("Ki", 1_000_000_000 << 10),
    ("Mi", 1_000_000_000 << 20),
    ("Gi", 1_000_000_000 << 30),
    ("Ti", 1_000_000_000 << 40),
    ("Pi", 1_000_000_000 << 50),
    ("Ei", 1_000_000_000 << 60),
];

/// Most digits on each side of the decimal point; the API server accepts fewer.
const MOST_DIGITS: usize = 18;

impl Quantity {
    /// Parses a quantity; `None` when it is invalid or negative.
    pub fn parse(text: &str) -> Option<Self> {
        let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at_checked(at)?;
        let unit = match suffix.strip_prefix(['e', 'E']).filter(|exponent| !exponent.is_empty()) {
            Some(exponent) => 1_000_000_000_i128.checked_mul(10_i128.checked_pow(exponent.parse().ok()?)?)?,
            None => SUFFIXES.iter().find(|(known, _)| *known == suffix)?.1,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.len() + fraction.len() == 0 || whole.len() > MOST_DIGITS || fraction.len() > MOST_DIGITS {
            return None;
        }
        let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
        let scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?.checked_mul(1_000_000)?;
        Some(Self(digits.checked_mul(unit)?.checked_add(scale - 1)?.checked_div(scale)?))
    }

    /// Whether the quantity is 0.
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Adds two quantities.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Subtracts a quantity; 0 when `used` is larger.
    pub fn minus(self, used: Self) -> Self {
        Self(self.0.saturating_sub(used.0).max(0))
    }

    /// Divides by a ratio such as `maxLimitRequestRatio`, and rounds up to a thousandth.
    pub fn divided_by(self, ratio: Self) -> Self {
        let scaled = self.0.saturating_mul(1000);
        Self(scaled.saturating_add(ratio.0.saturating_sub(1)).checked_div(ratio.0).unwrap_or(self.0))
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 % 1000 != 0 {
            return write!(f, "{}m", self.0);
        }
        let whole = self.0 / 1000;
        for (suffix, shift) in [("Gi", 30), ("Mi", 20), ("Ki", 10)] {
            if whole != 0 && whole % (1 << shift) == 0 {
                return write!(f, "{}{suffix}", whole >> shift);
            }
        }
        write!(f, "{whole}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_and_written_as_kubernetes_does() {
        for (text, shown) in [
            ("10m", "10m"),
            ("0.1", "100m"),
            ("1", "1"),
            ("1.5", "1500m"),
            ("16Mi", "16Mi"),
            ("1Gi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("128974848", "123Mi"),
            ("1e3", "1000"),
            ("100M", "100000000"),
            ("1n", "1m"),
            (".5", "500m"),
        ] {
            assert_eq!(Quantity::parse(text).map(|q| q.to_string()).as_deref(), Some(shown), "{text}");
        }
        for bad in ["", ".", "m", "-1", "1.2.3", "1 Gi", "lots", "1mi", "1e", "1e99", "99999999999999999999"]
        {
            assert_eq!(Quantity::parse(bad), None, "{bad}");
        }
        let half = Quantity::parse("1").unwrap().divided_by(Quantity::parse("2").unwrap());
        assert_eq!(half.to_string(), "500m");
    }
}
