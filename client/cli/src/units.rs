//! Sizes and durations as people write them, and the other way round.

use std::{fmt, ops::RangeInclusive, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, de};

/// Bytes; written `4096`, `64KiB`, `1.5G`, `2TB`.
///
/// `K`, `KiB` and so on are powers of 1024, `KB` and so on powers of 1000.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct ByteSize(pub(crate) u64);

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        let bad = || format!("'{text}' is not a size: write bytes or a number with KiB, MiB, GiB, TiB");
        let digits = text.trim().find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.trim().len());
        let (number, unit) = text.trim().split_at(digits);
        let factor = factor(unit.trim()).ok_or_else(bad)?;
        let bytes = match number.parse::<u64>() {
            Ok(n) => n.checked_mul(factor),
            // A fraction of a byte is dropped; f64 is exact far beyond what a fraction is worth here.
            Err(_) => {
                let n: f64 = number.parse().map_err(|_| bad())?;
                let bytes = n * factor as f64;
                (bytes.is_finite() && bytes < u64::MAX as f64).then_some(bytes as u64)
            }
        };
        bytes.map(ByteSize).ok_or_else(|| format!("'{text}' is more than 16 EiB"))
    }
}

fn factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if unit.is_empty() || unit == "b" {
        return Some(1);
    }
    let power = "kmgtpe".find(unit.chars().next()?)? as u32 + 1;
    match &unit[1..] {
        "" | "ib" => 1024u64.checked_pow(power),
        "b" => 1000u64.checked_pow(power),
        _ => None,
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut power = 0;
        while power + 1 < UNITS.len() && self.0 >> (10 * (power + 1)) > 0 {
            power += 1;
        }
        if power == 0 {
            return f.pad(&format!("{} B", self.0));
        }
        let n = self.0 as f64 / 1024f64.powi(power as i32);
        f.pad(&match n {
            n if n < 9.995 => format!("{n:.2} {}", UNITS[power]),
            n if n < 99.95 => format!("{n:.1} {}", UNITS[power]),
            n => format!("{n:.0} {}", UNITS[power]),
        })
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<ByteSize, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 4096 or \"64GiB\"")
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<ByteSize, E> {
                u64::try_from(n).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(n))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        input.deserialize_any(Visitor)
    }
}

/// A duration; written `500ms`, `30s`, `5m`, `1h 30m`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        humantime::parse_duration(text)
            .map(Span)
            .map_err(|e| format!("'{text}' is not a duration ({e}): write for example 500ms, 30s or 5m"))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = humantime::format_duration(self.0).to_string();
        // 7 days, but 500ms.
        let mut spaced = String::with_capacity(text.len() + 2);
        for part in text.split_inclusive(' ') {
            let unit = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let (number, unit) = part.split_at(unit);
            let gap = if ["day", "mon", "yea"].iter().any(|word| unit.starts_with(word)) { " " } else { "" };
            spaced += &format!("{number}{gap}{unit}");
        }
        f.pad(&spaced)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Span, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Span;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time with its unit, such as \"500ms\" or \"1s\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }
        }
        input.deserialize_any(Visitor)
    }
}

/// Bytes per second that something may be bound to: below, it would never end.
pub(crate) const RATES: RangeInclusive<ByteSize> = ByteSize(64 << 10)..=ByteSize(1 << 50);

/// A setting that has bounds.
///
/// # Errors
/// Names it, and what is possible.
pub(crate) fn within<T: PartialOrd + fmt::Display>(
    name: &str,
    value: T,
    range: RangeInclusive<T>,
) -> anyhow::Result<T> {
    let (least, most) = (range.start(), range.end());
    anyhow::ensure!(range.contains(&value), "{name} is {value}: from {least} to {most} is possible");
    Ok(value)
}

/// The same where 0 means something else.
pub(crate) fn zero_or_within<T: PartialOrd + fmt::Display>(
    name: &str,
    value: T,
    (zero, meaning): (T, &str),
    range: RangeInclusive<T>,
) -> anyhow::Result<T> {
    if value == zero {
        return Ok(value);
    }
    within(name, value, range).map_err(|e| anyhow::anyhow!("{e}, and 0: {meaning}"))
}

/// `1 file`, `2 files`.
pub(crate) fn count(n: u64, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{} {noun}s", grouped(n)) }
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A quotient of bytes and time, `12.3 MiB/s`.
pub(crate) fn rate(bytes: u64, time: Duration) -> String {
    let per_second = bytes as f64 / time.as_secs_f64().max(1e-3);
    format!("{}/s", ByteSize(per_second as u64))
}

/// Seconds with what precision is worth reading: `0.42 s`, `12.3 s`, `4m 12s`.
pub(crate) fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 10.0 => format!("{s:.2} s"),
        s if s < 100.0 => format!("{s:.1} s"),
        _ => humantime::format_duration(Duration::from_secs(time.as_secs())).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64KiB", 64 << 10),
            ("64k", 64 << 10),
            ("1.5G", 3 << 29),
            ("2 GiB", 2 << 30),
            ("2GB", 2_000_000_000),
            ("3TiB", 3 << 40),
            ("15E", 15 << 60),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_sizes_are_refused() {
        for text in ["", "G", "-1", "1.2.3", "12XB", "5 Gib5", "16E", "1e9999", "NaN", "1Kb b", "é"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10 << 20, "10.0 MiB"),
            (210 << 30, "210 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn bounds_are_told() {
        let sizes = ByteSize(1 << 20)..=ByteSize(1 << 30);
        assert_eq!(within("x", ByteSize(1 << 20), sizes.clone()).unwrap(), ByteSize(1 << 20));
        let error = within("x", ByteSize(5), sizes.clone()).unwrap_err().to_string();
        assert_eq!(error, "x is 5 B: from 1.00 MiB to 1.00 GiB is possible");
        let no_limit = (ByteSize(0), "no limit");
        assert_eq!(zero_or_within("x", ByteSize(0), no_limit, sizes.clone()).unwrap(), ByteSize(0));
        let error = zero_or_within("x", ByteSize(u64::MAX), no_limit, sizes).unwrap_err().to_string();
        assert!(error.ends_with("is possible, and 0: no limit"), "{error}");
    }

    #[test]
    fn durations_and_counts() {
        assert_eq!("1h 30m".parse(), Ok(Span(Duration::from_secs(5400))));
        assert!("soon".parse::<Span>().is_err());
        for (seconds, text) in [(5400, "1h 30m"), (604_800, "7 days"), (90_000, "1 day 1h")] {
            let span = Span(Duration::from_secs(seconds));
            assert_eq!((span.to_string().as_str(), text.parse()), (text, Ok(span)));
        }
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(1_234_567, "file"), "1,234,567 files");
        assert_eq!(grouped(999), "999");
        assert_eq!(rate(1 << 20, Duration::from_secs(1)), "1.00 MiB/s");
        assert_eq!(seconds(Duration::from_secs(252)), "4m 12s");
    }
}
