//! `strftime_now` for chat templates that write today's date (Llama 3.x).
//!
//! Times are UTC, and `SOURCE_DATE_EPOCH` (seconds, the reproducible-builds convention) fixes them: a prompt
//! scored on another day than it was sampled would otherwise be another prompt. For one process time stands still, so
//! that neither midnight nor a clock that is set changes its prompts on the way.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};
use time::UtcDateTime;
use time::format_description::parse_strftime_borrowed;

/// The template function: the process's time in Python's `strftime` notation.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, now())
}

/// The day that templates see, `YYYY-MM-DD`.
pub fn today() -> String {
    strftime("%Y-%m-%d", now()).expect("the notation is a known one")
}

/// When this process first asked; or as SOURCE_DATE_EPOCH says.
fn now() -> UtcDateTime {
    static NOW: OnceLock<UtcDateTime> = OnceLock::new();
    let fixed = || {
        let seconds = std::env::var("SOURCE_DATE_EPOCH").ok()?;
        at(seconds.trim().parse().ok()?)
    };
    let clock = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = since.map_or(0, |elapsed| elapsed.as_secs());
        at(seconds as i64).unwrap_or(UtcDateTime::UNIX_EPOCH)
    };
    *NOW.get_or_init(|| fixed().unwrap_or_else(clock))
}

/// A moment in seconds since 1970 UTC; none beyond the year 9999.
fn at(seconds: i64) -> Option<UtcDateTime> {
    UtcDateTime::from_unix_timestamp(seconds).ok()
}

fn strftime(format: &str, moment: UtcDateTime) -> Result<String, Error> {
    let written = parse_strftime_borrowed(format)
        .map_err(|err| err.to_string())
        .and_then(|items| moment.format(&items).map_err(|err| err.to_string()));
    written.map_err(|err| {
        let message = format!("strftime_now cannot write {format:?}: {err}");
        Error::new(ErrorKind::InvalidOperation, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_written_as_python_writes_them() {
        let of = |format: &str, seconds| strftime(format, at(seconds).unwrap()).unwrap();
        // Figures: datetime.fromtimestamp(t, timezone.utc).strftime(...).
        assert_eq!(of("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(
            of("%A %-d %B %y, %H:%M:%S %p %j", 951_782_400),
            "Tuesday 29 February 00, 00:00:00 AM 060"
        );
        assert_eq!(
            of("%F %T %I%% %a", 1_735_689_599),
            "2024-12-31 23:59:59 11% Tue"
        );
        assert_eq!(of("plain [text] é", 0), "plain [text] é");
    }

    #[test]
    fn unknown_directives_and_a_trailing_percent_are_refused() {
        for format in ["%Q", "%", "%-"] {
            assert!(
                strftime(format, UtcDateTime::UNIX_EPOCH).is_err(),
                "{format}"
            );
        }
        assert!(at(i64::MAX).is_none());
    }
}
