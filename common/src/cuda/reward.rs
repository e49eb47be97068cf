//! Implicit rewards of a whole batch of prompts, and the best and worst response of each, on the device.

use super::args;
use super::device::{Device, Launch};
use super::launches::THREADS;
use anyhow::{Result, ensure};

/// The rewards of a prompt's responses, and which of them a length price chooses.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// β·(log π − log π_ref) of each response.
    pub rewards: Vec<f64>,
    /// The best and the worst by r − α·length, as `best_and_worst` chooses them on the CPU; none where there is no response.
    pub best_and_worst: Option<(usize, usize)>,
}

/// A response as the reward sees it: log π, log π_ref (nats) and its length.
pub type Scored = (f64, f64, u64);

/// Rewards and choices of many prompts in one launch; `alpha` is the price of a unit of length.
///
/// # Errors
/// More than 2³¹ responses; a device that fails.
pub fn rewards(
    device: &Device,
    prompts: &[Vec<Scored>],
    beta: f64,
    alpha: f64,
) -> Result<Vec<Choice>> {
    let all = || prompts.iter().flatten();
    let count = all().count();
    ensure!(i32::try_from(count).is_ok(), "too many responses at once");
    let mut offsets = vec![0i32];
    for prompt in prompts {
        offsets.push(offsets[offsets.len() - 1] + prompt.len() as i32);
    }
    let policy = device.buffer_of(&all().map(|s| s.0).collect::<Vec<f64>>())?;
    let reference = device.buffer_of(&all().map(|s| s.1).collect::<Vec<f64>>())?;
    let lengths = device.buffer_of(&all().map(|s| s.2).collect::<Vec<u64>>())?;
    let starts = device.buffer_of(&offsets)?;
    let found = device.allocate(count * size_of::<f64>())?;
    let best = device.allocate(prompts.len() * size_of::<i32>())?;
    let worst = device.allocate(prompts.len() * size_of::<i32>())?;
    device.launch(
        "rewards",
        Launch::row(prompts.len().div_ceil(8), THREADS),
        args![
            &policy,
            &reference,
            &lengths,
            &starts,
            beta,
            alpha,
            &found,
            &best,
            &worst,
            prompts.len() as i32,
        ],
    )?;
    let found: Vec<f64> = found.read(0, count)?;
    let best: Vec<i32> = best.read(0, prompts.len())?;
    let worst: Vec<i32> = worst.read(0, prompts.len())?;
    let choice = |i: usize| Choice {
        rewards: found[offsets[i] as usize..offsets[i + 1] as usize].to_vec(),
        best_and_worst: (best[i] >= 0).then(|| (best[i] as usize, worst[i] as usize)),
    };
    Ok((0..prompts.len()).map(choice).collect())
}
