//! `strftime_now` for chat templates that write today's date (Llama 3.x).
//!
//! Times are UTC, and `SOURCE_DATE_EPOCH` (seconds, the reproducible-builds convention) fixes them: a prompt
//! scored on another day than it was sampled would otherwise be another prompt. For one process time stands still, so
//! that neither midnight nor a clock that is set changes its prompts on the way.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The template function: the process's time in Python's `strftime` notation.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, now())
}

/// The day that templates see, `YYYY-MM-DD`.
pub fn today() -> String {
    strftime("%Y-%m-%d", now()).expect("the notation is a known one")
}

/// When this process first asked, in seconds since 1970 UTC; or as SOURCE_DATE_EPOCH says.
fn now() -> u64 {
    static NOW: OnceLock<u64> = OnceLock::new();
    let fixed = || {
        let seconds = std::env::var("SOURCE_DATE_EPOCH").ok()?;
        seconds.trim().parse().ok()
    };
    let clock = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |elapsed| elapsed.as_secs())
    };
    *NOW.get_or_init(|| fixed().unwrap_or_else(clock))
}

/// Formats a moment, in seconds since 1970 UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day, of_year) = calendar(days);
    let weekday = DAYS[(days % 7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let number = |value: u64| {
            if padded {
                format!("{value:02}")
            } else {
                value.to_string()
            }
        };
        out.push_str(&match directive {
            Some('Y') => format!("{year:04}"),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(day),
            Some('H') => number(hour),
            Some('I') => number((hour + 11) % 12 + 1),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('j') => {
                if padded {
                    format!("{of_year:03}")
                } else {
                    of_year.to_string()
                }
            }
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map_or(String::new(), String::from);
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know %{other}"),
                ));
            }
        });
    }
    Ok(out)
}

/// Year, month (1–12), day (1–31) and day of the year (1–366) of a day counted from 1970-01-01.
fn calendar(mut days: u64) -> (u64, u64, u64, u64) {
    let leap = |year: u64| {
        (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
    };
    // Whole 400-year cycles first, so that a far moment costs no more than a near one.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let of_year = days + 1;
    let mut month = 1;
    for length in [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
    ] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, of_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_written_as_python_writes_them() {
        // Figures: datetime.fromtimestamp(t, timezone.utc).strftime(...).
        assert_eq!(strftime("%d %b %Y", 0).unwrap(), "01 Jan 1970");
        assert_eq!(
            strftime("%A %-d %B %y, %H:%M:%S %p %j", 951_782_400).unwrap(),
            "Tuesday 29 February 00, 00:00:00 AM 060"
        );
        assert_eq!(
            strftime("%F %T %I%%", 1_735_689_599).unwrap(),
            "2024-12-31 23:59:59 11%"
        );
    }

    #[test]
    fn unknown_directives_and_a_trailing_percent_are_refused() {
        for format in ["%Q", "%", "%-"] {
            assert!(strftime(format, 0).is_err(), "{format}");
        }
        strftime("%Y", u64::MAX).unwrap();
    }
}
