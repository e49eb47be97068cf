//! How much memory a tool may use: `--memory-budget`, or three quarters of what the machine has left. Batches are made to fit into
//! it, so that a long prompt makes a run slower, not dead; what does not fit even alone is left out and named.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Reads a size: bytes, or with a suffix K, M, G or T (powers of 1024).
pub fn size(text: &str) -> Result<usize> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => bail!("expected a size such as 8G, 512M or a number of bytes"),
    };
    let number: f64 = digits
        .trim()
        .parse()
        .context("expected a size such as 8G")?;
    let bytes = number * f64::from(2_u32.pow(10)).powi(unit / 10);
    if !(1.0..1e18).contains(&bytes) {
        bail!("expected a size such as 8G, 512M or a number of bytes");
    }
    Ok(bytes as usize)
}

/// What is left to compute in, bytes: of `budget` after what the process holds already (its models), or, where none is
/// given, three quarters of what the machine or the process's control group has left. Without bound where the system
/// says nothing.
///
/// # Errors
/// What the process holds already is more than `budget`.
pub fn left(budget: Option<usize>) -> Result<usize> {
    left_beside(budget, 0)
}

/// What can be had for models and batches, bytes, and what there is in all: of `budget`, or, where none is given, of what the machine
/// has left. Without bound where the system says nothing.
pub fn free_and_total(budget: Option<usize>) -> (usize, usize) {
    match budget {
        Some(bytes) => (bytes.saturating_sub(held()), bytes),
        None => available(Path::new("/")).map_or((usize::MAX, 0), |bytes| (bytes, bytes)),
    }
}

/// As [`left`], once the process holds `models` bytes more.
///
/// # Errors
/// These are more than `budget`.
pub fn left_beside(budget: Option<usize>, models: usize) -> Result<usize> {
    match budget {
        None => {
            let all = available(Path::new("/")).map_or(usize::MAX, |bytes| bytes / 4 * 3);
            Ok(all.saturating_sub(models))
        }
        Some(bytes) => beyond(bytes, held() + models),
    }
}

/// What `budget` leaves beyond the bytes that the models take.
///
/// # Errors
/// A budget of which they leave nothing.
pub fn beyond(budget: usize, models: usize) -> Result<usize> {
    match budget.checked_sub(models) {
        Some(left) if left > 0 => Ok(left),
        _ => bail!(
            "--memory-budget: {} MB are less than the {} MB that the models take by themselves",
            budget >> 20,
            models.div_ceil(1 << 20)
        ),
    }
}

/// The process's own memory, files that are only mapped left out.
fn held() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let told = kib(&status, "RssAnon:").or_else(|| Some(without_proc()?.1));
    told.unwrap_or(0)
}

/// What can still be had, below a root.
fn available(root: &Path) -> Option<usize> {
    let machine = fs::read_to_string(root.join("proc/meminfo"));
    let machine = machine.ok().and_then(|text| kib(&text, "MemAvailable:"));
    let told = groups(root).into_iter().chain(machine).min();
    told.or_else(|| Some(without_proc()?.0))
}

/// What a system without /proc says, bytes: what can be had, and what this process holds, mapped files included.
#[cfg(target_os = "linux")]
fn without_proc() -> Option<(usize, usize)> {
    None
}

#[cfg(not(target_os = "linux"))]
fn without_proc() -> Option<(usize, usize)> {
    use sysinfo::{ProcessesToUpdate, System, get_current_pid};
    let pid = get_current_pid().ok()?;
    let mut system = System::new();
    system.refresh_memory();
    system.refresh_processes(ProcessesToUpdate::Some(&[pid]), false);
    let bytes = |bytes| usize::try_from(bytes).ok();
    let held = system.process(pid)?.memory();
    Some((bytes(system.available_memory())?, bytes(held)?))
}

/// What the process's control groups leave, those around its own included.
fn groups(root: &Path) -> Vec<usize> {
    let lines = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut found = vec![];
    for line in lines.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next(), parts.next().unwrap_or("/"));
        let (mount, limit, usage, cache) = match controllers {
            Some("") => ("", "memory.max", "memory.current", "inactive_file"),
            Some("memory") => (
                "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
            _ => continue,
        };
        let mount = root.join("sys/fs/cgroup").join(mount);
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let read = |file: &str| fs::read_to_string(mount.join(group).join(file)).ok();
            let number = |file: &str| read(file)?.trim().parse::<usize>().ok();
            // Cached files can be dropped.
            let cached = read("memory.stat").and_then(|text| field(&text, cache));
            if let (Some(limit), Some(used)) = (number(limit), number(usage)) {
                found.push((limit.saturating_add(cached.unwrap_or(0))).saturating_sub(used));
            }
        }
    }
    found
}

/// A line `NAME  NUMBER kB`, in bytes.
fn kib(text: &str, name: &str) -> Option<usize> {
    field(text, name).map(|kib| kib << 10)
}

/// The number after a name at the start of a line.
fn field(text: &str, name: &str) -> Option<usize> {
    let mut words = text
        .lines()
        .map(str::split_whitespace)
        .find_map(|mut words| (words.next() == Some(name)).then_some(words))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("2K", 2048),
            ("1.5m", 3 << 19),
            ("8G", 8 << 30),
            ("8GiB", 8 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for wrong in ["", "G", "-1G", "0", "8X", "nan", "1e30"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_least_of_machine_and_groups_is_what_can_be_had() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(available(root.path()), None);
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   64 kB\n");
        assert_eq!(available(root.path()), Some(64 << 10));
        write("proc/self/cgroup", "5:cpu:/\n4:memory:/a\n0::/b/c\n");
        write("sys/fs/cgroup/b/c/memory.max", "max\n");
        write("sys/fs/cgroup/b/c/memory.current", "5000\n");
        assert_eq!(available(root.path()), Some(64 << 10));
        write("sys/fs/cgroup/b/memory.max", "9000\n");
        write("sys/fs/cgroup/b/memory.current", "5000\n");
        write(
            "sys/fs/cgroup/b/memory.stat",
            "anon 1\ninactive_file 1000\n",
        );
        assert_eq!(available(root.path()), Some(5000));
        write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "3000\n");
        write("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "2000\n");
        assert_eq!(available(root.path()), Some(1000));
    }

    #[test]
    fn a_budget_is_less_what_is_held() {
        assert!(left(Some(1 << 40)).unwrap() < 1 << 40);
        assert!(left(None).unwrap() > 0);
        let refused = left(Some(1 << 10)).unwrap_err().to_string();
        assert!(
            refused.starts_with("--memory-budget: 0 MB are less than the "),
            "{refused}"
        );
    }
}
