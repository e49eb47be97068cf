//! Keeps a panic of the tokenizers crate, which some broken files cause where it should fail, an error of one line.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use anyhow::{Result, anyhow};

thread_local! {
    /// Whether this thread's panics are caught here, and need no report of their own.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`; a panic in it is an error. What it worked on is dropped or only read, so that nothing half done is seen.
pub fn contained<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |info| {
            if !CONTAINED.get() {
                report(info);
            }
        }));
    });
    let outer = CONTAINED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(outer);
    result.unwrap_or_else(|panic| {
        let reason = first_line(&*panic);
        Err(anyhow!("the tokenizer is broken: {reason}"))
    })
}

fn first_line(panic: &(dyn Any + Send)) -> &str {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next())
        .unwrap_or("it panics")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_of_one_line() {
        let result: Result<()> = contained(|| panic!("on\nfire {}", 1));
        assert_eq!(
            result.unwrap_err().to_string(),
            "the tokenizer is broken: on"
        );
        assert_eq!(contained(|| Ok(1)).unwrap(), 1);
        assert!(!CONTAINED.get());
    }
}
