//! The implicit reward of DPO, its shaping by length, and α*: the shaping under which the chosen responses are,
//! on average, as long as the rejected ones.
//!
//! DICE (arXiv 2406.09760) searches α on a grid. Here it is exact. For one prompt, the best response under
//! r − α|y| is the upper envelope of lines with slope −|y| and intercept r; as α grows, the best changes only at
//! the envelope's corners, each time to a shorter response. The worst is the lower envelope and changes only to
//! longer ones. So the mean length gap (best minus worst) is a step function of α that never rises, and its values
//! are those at 0 and at the corners of all prompts: sort the corners, sweep once, keep the smallest |gap|.
//! Time O(n log n) in the number of responses.
//!
//! Exact also means that the choice made at α* is the choice that the sweep counted. Scores rounded to float64
//! would not do: at a corner two responses tie, and rounding decides. So responses are compared without computing
//! scores: the shorter one wins iff r_long − r_short ≤ α (|y_long| − |y_short|), where the difference and the
//! product are taken without rounding error, as sums of two float64s. That is a total order at every float64 α.
//! A corner is the least float64 α at which the shorter response wins.

use std::cmp::Ordering;

/// β (log π(y|x) − log π_ref(y|x)): the reward that a DPO-trained policy π stands for, up to a term of the prompt
/// alone (arXiv 2305.18290, eq. 5). Log-probs in nats, summed over the response's tokens.
pub fn implicit_reward(beta: f64, policy_logps: f64, ref_logps: f64) -> f64 {
    beta * (policy_logps - ref_logps)
}

/// r − α|y|, rounded: for people and files. Choices are made by [`best_and_worst`].
pub fn shaped(reward: f64, alpha: f64, length: u64) -> f64 {
    reward - alpha * length as f64
}

/// The greatest |reward| that the exact comparison holds for.
pub const MAX_REWARD: f64 = 1e150;

/// A response as the choice sees it. `reward` within ±[`MAX_REWARD`], `length` in characters or tokens, below 2⁵³.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub reward: f64,
    pub length: u64,
}

/// The indices of the best and the worst response under r − α|y|; `None` of no responses.
/// A tie goes to the shorter one as best and to the longer one as worst, then to the earlier one.
pub fn best_and_worst(points: &[Point], alpha: f64) -> Option<(usize, usize)> {
    let best = top(&upward(points), alpha)?;
    let worst = top(&downward(points), alpha)?;
    Some((best, worst))
}

/// α* and what it does to the gap: mean over prompts of |best| − |worst|.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// The least α ≥ 0 with the smallest |gap|.
    pub alpha: f64,
    pub gap_at_zero: f64,
    pub gap: f64,
    /// The whole step function: (α, gap from this α on), from α = 0, α rising.
    pub steps: Vec<(f64, f64)>,
}

/// Finds α* over prompts, each given by its responses. Prompts without responses do not count.
pub fn balance_lengths(prompts: &[Vec<Point>]) -> Balance {
    let mut gap = 0_i128;
    let mut corners = Vec::new();
    for points in prompts {
        // The best's key is −|best| and the worst's is |worst|: the gap is minus their sum.
        for side in [upward(points), downward(points)] {
            let envelope = Envelope::of(side);
            gap += envelope.start.map_or(0, |key| -i128::from(key));
            corners.extend(envelope.corners);
        }
    }
    corners.sort_by(|a, b| a.alpha.total_cmp(&b.alpha));

    let mut steps = vec![(0.0, gap)];
    for corner in corners {
        gap -= i128::from(corner.gain);
        match steps.last_mut() {
            Some(last) if last.0 == corner.alpha => last.1 = gap,
            _ => steps.push((corner.alpha, gap)),
        }
    }
    let least = steps.iter().copied().min_by_key(|(_, gap)| gap.abs());
    let (alpha, gap) = least.expect("holds the step at 0");

    let count = prompts.iter().filter(|points| !points.is_empty()).count();
    let mean = |sum: i128| sum as f64 / count.max(1) as f64;
    Balance {
        alpha,
        gap_at_zero: mean(steps[0].1),
        gap: mean(gap),
        steps: steps.iter().map(|&(a, sum)| (a, mean(sum))).collect(),
    }
}

/// A line `value + α key`: both sides of the choice are "the highest line, of equals the one with the higher key".
#[derive(Clone, Copy)]
struct Line {
    value: f64,
    key: i64,
    index: usize,
}

/// Best of r − α|y|: lines r + α(−|y|).
fn upward(points: &[Point]) -> Vec<Line> {
    lines(points, |p| (p.reward, -(p.length as i64)))
}

/// Worst of r − α|y|: the highest of −r + α|y|.
fn downward(points: &[Point]) -> Vec<Line> {
    lines(points, |p| (-p.reward, p.length as i64))
}

fn lines(points: &[Point], line: impl Fn(&Point) -> (f64, i64)) -> Vec<Line> {
    let indexed = points.iter().enumerate();
    indexed
        .map(|(index, point)| {
            let (value, key) = line(point);
            Line { value, key, index }
        })
        .collect()
}

/// The index of the highest line at α.
fn top(lines: &[Line], alpha: f64) -> Option<usize> {
    let mut best: Option<&Line> = None;
    for line in lines {
        if best.is_none_or(|best| above(line, best, alpha)) {
            best = Some(line);
        }
    }
    best.map(|line| line.index)
}

/// Whether the later line `a` is above `b` at α; never of equals.
fn above(a: &Line, b: &Line, alpha: f64) -> bool {
    match a.key.cmp(&b.key) {
        Ordering::Equal => a.value > b.value,
        Ordering::Greater => steeper_wins(b, a, alpha),
        Ordering::Less => !steeper_wins(a, b, alpha),
    }
}

/// Whether `flat.value − steep.value ≤ α (steep.key − flat.key)`, where steep.key > flat.key. Exact: both sides are
/// sums hi + lo of float64s with hi the nearest float64 to the sum, and such sums compare as (hi, lo) do.
fn steeper_wins(flat: &Line, steep: &Line, alpha: f64) -> bool {
    let lead = difference(flat.value, steep.value);
    let catch = product(alpha, (steep.key - flat.key) as f64);
    lead.0 < catch.0 || (lead.0 == catch.0 && lead.1 <= catch.1)
}

/// a − b without error (Knuth's TwoSum).
fn difference(a: f64, b: f64) -> (f64, f64) {
    let hi = a - b;
    let back = hi - a;
    (hi, (a - (hi - back)) - (b + back))
}

/// a · b without error, as long as nothing underflows.
fn product(a: f64, b: f64) -> (f64, f64) {
    let hi = a * b;
    (hi, a.mul_add(b, -hi))
}

/// The least float64 α at which the steeper line wins; below 0 where it wins at once.
fn corner(flat: &Line, steep: &Line) -> f64 {
    // The quotient is within a few units in the last place of the answer; the predicate finds which it is.
    let mut alpha = (flat.value - steep.value) / (steep.key - flat.key) as f64;
    while steeper_wins(flat, steep, alpha) {
        alpha = alpha.next_down();
    }
    while !steeper_wins(flat, steep, alpha) {
        alpha = alpha.next_up();
    }
    alpha
}

/// Where the highest line changes as α grows from 0.
struct Envelope {
    /// The key of the highest line at α = 0.
    start: Option<i64>,
    corners: Vec<Corner>,
}

struct Corner {
    /// Above 0, rising within an envelope.
    alpha: f64,
    /// By how much the key of the highest line grows here.
    gain: i64,
}

impl Envelope {
    fn of(mut lines: Vec<Line>) -> Self {
        // Flat to steep; of equal keys only the highest can ever be on top.
        lines.sort_by(|a, b| a.key.cmp(&b.key).then(b.value.total_cmp(&a.value)));
        lines.dedup_by_key(|line| line.key);

        // The hull: (line, α from which it is on top). A line that its successor overtakes no later than it
        // overtakes its predecessor is never on top at any float64 α.
        let mut hull: Vec<(Line, f64)> = Vec::new();
        for line in lines {
            let mut from = f64::NEG_INFINITY;
            while let Some((flat, flat_from)) = hull.last() {
                from = corner(flat, &line);
                if from > *flat_from {
                    break;
                }
                hull.pop();
                from = f64::NEG_INFINITY;
            }
            // What is overtaken before α > 0 was never on top.
            if from <= 0.0 {
                hull.clear();
                from = f64::NEG_INFINITY;
            }
            hull.push((line, from));
        }
        let keys = hull.windows(2).map(|pair| Corner {
            alpha: pair[1].1,
            gain: pair[1].0.key - pair[0].0.key,
        });
        Self {
            start: hull.first().map(|(line, _)| line.key),
            corners: keys.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(rows: &[(f64, u64)]) -> Vec<Point> {
        let point = |&(reward, length)| Point { reward, length };
        rows.iter().map(point).collect()
    }

    #[test]
    fn reward_and_shaping() {
        assert_eq!(implicit_reward(0.1, -10.0, -30.0), 2.0);
        assert_eq!(shaped(2.0, 0.5, 3), 0.5);
    }

    #[test]
    fn a_hand_worked_prompt() {
        let prompt = points(&[(3.0, 30), (1.0, 14), (0.0, 14)]);
        // Best: (3, 30) until (3−1)/(30−14) = 1/8, then (1, 14). Worst: (0, 14) until (3−0)/(30−14) = 3/16, then 30.
        let got = balance_lengths(std::slice::from_ref(&prompt));
        assert_eq!(got.gap_at_zero, 16.0);
        assert_eq!((got.alpha, got.gap), (0.125, 0.0));
        assert_eq!(got.steps, [(0.0, 16.0), (0.125, 0.0), (0.1875, -16.0)]);
        assert_eq!(best_and_worst(&prompt, 0.124), Some((0, 2)));
        assert_eq!(best_and_worst(&prompt, 0.125), Some((1, 2)));
        assert_eq!(best_and_worst(&prompt, 0.1875), Some((1, 0)));
    }

    #[test]
    fn shorter_chosen_from_the_start_needs_no_shaping() {
        let got = balance_lengths(&[points(&[(1.0, 5), (0.0, 9)])]);
        assert_eq!((got.alpha, got.gap, got.gap_at_zero), (0.0, -4.0, -4.0));
    }

    #[test]
    fn of_two_gaps_as_small_the_smaller_alpha_wins() {
        // Gap 4 until 0.25, then −4.
        let got = balance_lengths(&[points(&[(1.0, 9), (0.0, 5)])]);
        assert_eq!((got.alpha, got.gap), (0.0, 4.0));
    }

    #[test]
    fn degenerate_inputs() {
        let nothing = balance_lengths(&[]);
        assert_eq!((nothing.alpha, nothing.gap), (0.0, 0.0));
        assert_eq!(balance_lengths(&[vec![]]), nothing);
        assert_eq!(best_and_worst(&[], 0.0), None);
        // One response; equal rewards; equal lengths; equal altogether.
        assert_eq!(balance_lengths(&[points(&[(1.0, 3)])]).steps, [(0.0, 0.0)]);
        let equal_rewards = points(&[(1.0, 3), (1.0, 9), (1.0, 6)]);
        assert_eq!(best_and_worst(&equal_rewards, 0.0), Some((0, 1)));
        assert_eq!(balance_lengths(&[equal_rewards]).gap, -6.0);
        let equal_lengths = points(&[(1.0, 3), (2.0, 3), (2.0, 3), (1.0, 3)]);
        assert_eq!(best_and_worst(&equal_lengths, 7.0), Some((1, 0)));
        assert_eq!(balance_lengths(&[equal_lengths]).steps, [(0.0, 0.0)]);
        assert_eq!(
            best_and_worst(&points(&[(1.0, 3), (1.0, 3)]), 0.0),
            Some((0, 0))
        );
    }

    #[test]
    fn extreme_scales_end() {
        for scale in [f64::MIN_POSITIVE, 1e-300, 1e-9, 1e9, MAX_REWARD] {
            let prompt = points(&[(scale, 30), (-scale, 7), (scale / 3.0, 20), (0.0, 9)]);
            let got = balance_lengths(std::slice::from_ref(&prompt));
            let (best, worst) = best_and_worst(&prompt, got.alpha).unwrap();
            let gap = prompt[best].length as f64 - prompt[worst].length as f64;
            assert_eq!(got.gap, gap, "at scale {scale}");
        }
    }

    /// Prompts with integer rewards, so that the oracle works in integers; each reward is a float64 exactly.
    type Prompts = Vec<Vec<(i128, u64)>>;

    fn prompts() -> impl Strategy<Value = Prompts> {
        // Many ties; real sizes; rewards whose differences no float64 holds, but below 2⁶¹: the oracle multiplies them by
        // the denominators of the smallest α, up to 2⁶⁵, in 128 bits.
        let few = prop::collection::vec((-4_i128..5, 0_u64..6), 0..7);
        let many = prop::collection::vec((-1_000_000_i128..1_000_000, 0_u64..5_000), 1..20);
        let wide = (1_i128 << 52..1 << 53, prop::bool::ANY)
            .prop_map(|(m, up)| if up { m << 7 } else { m });
        let wide = prop::collection::vec((wide, 1_u64..4), 1..6);
        prop::collection::vec(prop_oneof![3 => few, 2 => many, 1 => wide], 0..7)
    }

    fn scaled(prompts: &Prompts, scale: f64) -> Vec<Vec<Point>> {
        let point = |&(reward, length): &(i128, u64)| Point {
            reward: reward as f64 * scale,
            length,
        };
        let prompt = |rows: &Vec<(i128, u64)>| rows.iter().map(point).collect();
        prompts.iter().map(prompt).collect()
    }

    /// A float64 ≥ 0 as the fraction that it is.
    fn fraction(x: f64) -> (i128, i128) {
        let (bits, fraction) = (x.to_bits(), x.to_bits() & ((1 << 52) - 1));
        match (bits >> 52) as i32 {
            _ if x == 0.0 => (0, 1),
            e if e >= 1075 => (i128::from(fraction | 1 << 52) << (e - 1075), 1),
            e => (i128::from(fraction | 1 << 52), 1 << (1075 - e)),
        }
    }

    /// The choice at α by scores in integers.
    fn oracle(rows: &[(i128, u64)], alpha: f64) -> Option<(usize, usize)> {
        let (p, q) = fraction(alpha);
        let score = |i: usize| q * rows[i].0 - p * i128::from(rows[i].1);
        let best = (0..rows.len()).min_by_key(|&i| (-score(i), rows[i].1, i))?;
        let worst = (0..rows.len()).min_by_key(|&i| (score(i), std::cmp::Reverse(rows[i].1), i))?;
        Some((best, worst))
    }

    fn oracle_gap(prompts: &Prompts, alpha: f64) -> i128 {
        let gap = |rows: &Vec<(i128, u64)>| {
            oracle(rows, alpha).map_or(0, |(b, w)| i128::from(rows[b].1) - i128::from(rows[w].1))
        };
        prompts.iter().map(gap).sum()
    }

    /// 0 and the least float64 at or above every α > 0 where two responses of a prompt tie; rising.
    fn all_ties(prompts: &Prompts) -> Vec<f64> {
        let mut ties = vec![0.0];
        for rows in prompts {
            for a in rows {
                for b in rows.iter().filter(|b| b.1 < a.1 && b.0 < a.0) {
                    let (reward, length) = (a.0 - b.0, i128::from(a.1 - b.1));
                    let reached = |alpha: f64| {
                        let (p, q) = fraction(alpha);
                        p * length >= q * reward
                    };
                    let mut alpha = reward as f64 / length as f64;
                    while reached(alpha) {
                        alpha = alpha.next_down();
                    }
                    while !reached(alpha) {
                        alpha = alpha.next_up();
                    }
                    ties.push(alpha);
                }
            }
        }
        ties.sort_by(f64::total_cmp);
        ties
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn alpha_is_the_brute_force_one_at_any_scale(prompts in prompts(), exponent in -60_i32..60) {
            let scale = 2_f64.powi(exponent);
            let points = scaled(&prompts, scale);
            let got = balance_lengths(&points);
            let ties = all_ties(&prompts);
            let expected = *ties.iter().min_by_key(|&&a| oracle_gap(&prompts, a).abs()).unwrap();
            prop_assert_eq!(got.alpha, expected * scale);

            let count = prompts.iter().filter(|rows| !rows.is_empty()).count().max(1) as f64;
            prop_assert_eq!(got.gap, oracle_gap(&prompts, expected) as f64 / count);
            prop_assert_eq!(got.gap_at_zero, oracle_gap(&prompts, 0.0) as f64 / count);

            // The choice at α* has the gap that α* was chosen for.
            let chosen: i128 = points
                .iter()
                .filter_map(|p| best_and_worst(p, got.alpha).map(|(b, w)| (p[b].length, p[w].length)))
                .map(|(b, w)| i128::from(b) - i128::from(w))
                .sum();
            prop_assert_eq!(chosen as f64 / count, got.gap);
        }

        #[test]
        fn the_steps_are_the_gap_everywhere_and_never_rise(prompts in prompts()) {
            let got = balance_lengths(&scaled(&prompts, 1.0));
            let count = prompts.iter().filter(|rows| !rows.is_empty()).count().max(1) as f64;
            prop_assert!(got.steps.windows(2).all(|s| s[0].0 < s[1].0 && s[0].1 > s[1].1));
            for alpha in all_ties(&prompts).into_iter().flat_map(|a| [a, a.next_down().max(0.0)]) {
                let at = got.steps.iter().rev().find(|(from, _)| *from <= alpha).unwrap();
                prop_assert_eq!(at.1, oracle_gap(&prompts, alpha) as f64 / count);
            }
        }

        #[test]
        fn best_and_worst_agree_with_scores_in_integers(prompts in prompts(), alpha in 0.0..2000.0_f64) {
            for (rows, points) in prompts.iter().zip(scaled(&prompts, 1.0)) {
                for alpha in [0.0, 1.0, (alpha * 256.0).round() / 256.0] {
                    prop_assert_eq!(best_and_worst(&points, alpha), oracle(rows, alpha));
                }
            }
        }
    }
}
