//! Win rates of a model against a baseline, as AlpacaEval's leaderboard gives them (alpaca_eval 0.6.6,
//! metrics/helpers.py and metrics/winrate.py).

use serde::Serialize;

use super::spread;

/// One judged pair of outputs: the baseline's and the model's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// Length of the baseline's output, in characters.
    pub len_1: f64,
    /// Length of the model's output, in characters.
    pub len_2: f64,
    /// Probability in [0, 1] that the model's output is the better one (AlpacaEval's `preference` − 1);
    /// `None` where the judge said nothing.
    pub win: Option<f64>,
    /// How hard the instruction is for a model compared to the baseline; 0 where nobody knows.
    pub difficulty: f64,
}

/// The leaderboard's columns, in its order and units (percent, characters).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WinRate {
    pub win_rate: f64,
    /// Of `win_rate`: standard deviation (n − 1) over √n; 0 of one pair.
    pub standard_error: f64,
    pub n_wins: u64,
    pub n_wins_base: u64,
    pub n_draws: u64,
    /// Judged pairs.
    pub n_total: u64,
    /// Wins and half the draws over the judged pairs.
    pub discrete_win_rate: f64,
    /// Mean length of the model's outputs, judged or not; the integer part.
    pub avg_length: u64,
}

/// `None` where no pair was judged.
pub fn win_rate(pairs: &[Judged]) -> Option<WinRate> {
    let wins: Vec<f64> = pairs.iter().filter_map(|pair| pair.win).collect();
    let spread = spread(&wins)?;
    let count = |is: fn(f64) -> bool| wins.iter().filter(|&&win| is(win)).count() as u64;
    let (n_wins, n_draws) = (count(|win| win > 0.5), count(|win| win == 0.5));
    let n = spread.count as f64;
    Some(WinRate {
        win_rate: 100.0 * spread.mean,
        standard_error: 100.0 * spread.standard_deviation / n.sqrt(),
        n_wins,
        n_wins_base: count(|win| win < 0.5),
        n_draws,
        n_total: spread.count,
        discrete_win_rate: 100.0 * (n_wins as f64 + n_draws as f64 / 2.0) / n,
        avg_length: (pairs.iter().map(|pair| pair.len_2).sum::<f64>() / pairs.len() as f64) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(len_2: f64, win: Option<f64>) -> Judged {
        Judged {
            len_1: 10.0,
            len_2,
            win,
            difficulty: 0.0,
        }
    }

    #[test]
    fn worked_by_hand() {
        let pairs = [
            judged(10.0, Some(1.0)),
            judged(11.0, Some(0.5)),
            judged(12.0, Some(0.0)),
            judged(10.0, Some(0.1)),
            judged(12.0, None),
        ];
        let got = win_rate(&pairs).unwrap();
        assert!((got.win_rate - 40.0).abs() < 1e-12);
        // Deviations 0.6 0.1 −0.4 −0.3: squares sum to 0.62.
        let error = 100.0 * (0.62_f64 / 3.0).sqrt() / 2.0;
        assert!((got.standard_error - error).abs() < 1e-12);
        assert_eq!((got.n_wins, got.n_wins_base, got.n_draws), (1, 2, 1));
        assert_eq!((got.n_total, got.discrete_win_rate), (4, 37.5));
        assert_eq!(got.avg_length, 11, "55 characters in 5 outputs");
    }

    #[test]
    fn nothing_judged_no_rate() {
        assert_eq!(win_rate(&[]), None);
        assert_eq!(win_rate(&[judged(1.0, None)]), None);
        assert_eq!(
            win_rate(&[judged(1.0, Some(1.0))]).unwrap().standard_error,
            0.0
        );
    }
}
