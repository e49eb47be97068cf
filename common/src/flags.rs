//! What a number in a flag may be: parsers for clap, so that one without a meaning is wrong usage, said in one line, in every
//! tool.

use anyhow::{Result, bail};
use std::str::FromStr;

/// A finite number that `fits`; else the line says that it must be `what`.
///
/// # Errors
/// Text that is no such number.
pub fn number<T>(text: &str, fits: impl Fn(f64) -> bool, what: &str) -> Result<T>
where
    T: FromStr + Copy + Into<f64>,
{
    match text.parse::<T>() {
        Ok(number) if number.into().is_finite() && fits(number.into()) => Ok(number),
        _ => bail!("must be {what}"),
    }
}

/// Above 0.
///
/// # Errors
/// As [`number`].
pub fn positive<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T> {
    number(text, |x| x > 0.0, "a number above 0")
}

/// 0 or more.
///
/// # Errors
/// As [`number`].
pub fn not_negative<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T> {
    number(text, |x| x >= 0.0, "a number not below 0")
}

/// From 0 to 1.
///
/// # Errors
/// As [`number`].
pub fn share<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T> {
    number(text, |x| (0.0..=1.0).contains(&x), "a number from 0 to 1")
}

/// Beyond any use, and short of what lists of that length need more memory for than there is.
const MOST: usize = 1 << 20;

/// A whole number from 1 to a million.
///
/// # Errors
/// Text that is none.
pub fn count(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(count) if (1..=MOST).contains(&count) => Ok(count),
        _ => bail!("must be a whole number, at least 1 and at most {MOST}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_a_meaning_are_refused() {
        for odd in ["", "x", "nan", "inf", "-inf", "1e999", "-0.5"] {
            assert!(positive::<f64>(odd).is_err(), "{odd}");
            assert!(not_negative::<f32>(odd).is_err(), "{odd}");
            assert!(share::<f64>(odd).is_err(), "{odd}");
            assert!(count(odd).is_err(), "{odd}");
        }
        // More than float32 can say.
        assert!(positive::<f32>("1e39").is_err());
        assert!(positive::<f64>("0").is_err() && share::<f64>("1.01").is_err());
        assert!(["0", "1.5", "4000000000"].iter().all(|n| count(n).is_err()));
    }

    #[test]
    fn the_ends_of_a_range_belong_to_it() {
        assert_eq!(positive::<f64>("1e-9").unwrap(), 1e-9);
        assert_eq!(not_negative::<f32>("0").unwrap(), 0.0);
        assert_eq!(["0", "1"].map(|s| share::<f64>(s).unwrap()), [0.0, 1.0]);
        assert_eq!(count("1").unwrap(), 1);
    }
}
