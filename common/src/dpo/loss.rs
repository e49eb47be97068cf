//! The preference losses: four log-probs in, the loss, its slope and two rewards out. No model in sight.

use serde::{Deserialize, Serialize};

/// Which loss; the names are TRL's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LossType {
    /// −log σ(Δ) (DPO, arXiv 2305.18290, eq. 7); with label smoothing, cDPO.
    Sigmoid,
    /// (Δ per token / β − 1/(2β))² (IPO, arXiv 2310.12036, eq. 17, log-ratios averaged over tokens as TRL does).
    Ipo,
    /// max(0, 1 − Δ) (SLiC, arXiv 2305.10425).
    Hinge,
    /// The unbiased estimate under flipped labels (arXiv 2403.00409).
    Robust,
}

/// A loss with its settings. Δ = β·[(π − π_ref)(chosen) − (π − π_ref)(rejected)].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Which.
    pub loss_type: LossType,
    /// β.
    pub beta: f64,
    /// The probability that a label is wrong, in [0, 0.5); for sigmoid and robust.
    pub label_smoothing: f64,
    /// Weight of the chosen responses' negative log-likelihood per token (RPO, arXiv 2404.19733); 0 leaves it out.
    pub rpo_alpha: f64,
}

/// Summed log-probs of a pair (nats) and the responses' lengths (tokens).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLogps {
    /// log π(chosen).
    pub policy_chosen: f64,
    /// log π(rejected).
    pub policy_rejected: f64,
    /// log π_ref(chosen).
    pub ref_chosen: f64,
    /// log π_ref(rejected).
    pub ref_rejected: f64,
    /// Tokens of the chosen response, its end-of-turn token included.
    pub chosen_tokens: usize,
    /// Tokens of the rejected response.
    pub rejected_tokens: usize,
}

/// What a loss says of one pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLoss {
    /// The preference loss, without the RPO term (which is the batch's).
    pub loss: f64,
    /// ∂loss/∂ log π(chosen).
    pub d_chosen: f64,
    /// ∂loss/∂ log π(rejected).
    pub d_rejected: f64,
    /// β·(log π − log π_ref) of the chosen response.
    pub reward_chosen: f64,
    /// The same of the rejected one.
    pub reward_rejected: f64,
}

impl Objective {
    /// The loss of one pair.
    pub fn pair(&self, logps: &PairLogps) -> PairLoss {
        let (beta, s) = (self.beta, self.label_smoothing);
        let chosen = logps.policy_chosen - logps.ref_chosen;
        let rejected = logps.policy_rejected - logps.ref_rejected;
        let delta = beta * (chosen - rejected);
        // (loss, ∂/∂chosen ratio, ∂/∂rejected ratio)
        let of_delta = |loss: f64, slope: f64| (loss, beta * slope, -beta * slope);
        let (loss, d_chosen, d_rejected) = match self.loss_type {
            LossType::Sigmoid => of_delta(
                (1.0 - s) * softplus(-delta) + s * softplus(delta),
                (1.0 - s) * -sigmoid(-delta) + s * sigmoid(delta),
            ),
            LossType::Robust => of_delta(
                ((1.0 - s) * softplus(-delta) - s * softplus(delta)) / (1.0 - 2.0 * s),
                ((1.0 - s) * -sigmoid(-delta) - s * sigmoid(delta)) / (1.0 - 2.0 * s),
            ),
            LossType::Hinge => {
                of_delta((1.0 - delta).max(0.0), if delta < 1.0 { -1.0 } else { 0.0 })
            }
            LossType::Ipo => {
                let (n_chosen, n_rejected) =
                    (logps.chosen_tokens as f64, logps.rejected_tokens as f64);
                let gap = chosen / n_chosen - rejected / n_rejected - 1.0 / (2.0 * beta);
                (gap * gap, 2.0 * gap / n_chosen, -2.0 * gap / n_rejected)
            }
        };
        PairLoss {
            loss,
            d_chosen,
            d_rejected,
            reward_chosen: beta * chosen,
            reward_rejected: beta * rejected,
        }
    }
}

/// log(1 + eˣ) without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Every figure of tests/golden/dpo_losses.json, which PyTorch made (make_dpo_losses.py).
    #[test]
    fn losses_and_slopes_are_pytorchs() {
        let golden: Value =
            serde_json::from_str(include_str!("../../../tests/golden/dpo_losses.json")).unwrap();
        let mut pairs = 0;
        for batch in golden["batches"].as_array().unwrap() {
            let objective = Objective {
                loss_type: serde_json::from_value(batch["loss_type"].clone()).unwrap(),
                beta: batch["beta"].as_f64().unwrap(),
                label_smoothing: batch["label_smoothing"].as_f64().unwrap(),
                rpo_alpha: batch["rpo_alpha"].as_f64().unwrap_or(0.0),
            };
            let rows = batch["pairs"].as_array().unwrap();
            let (n, chosen_tokens): (f64, f64) = (
                rows.len() as f64,
                rows.iter()
                    .map(|p| p["chosen_tokens"].as_f64().unwrap())
                    .sum(),
            );
            for row in rows {
                let at = |field: &str| row[field].as_f64().unwrap();
                let found = objective.pair(&PairLogps {
                    policy_chosen: at("policy_chosen_logps"),
                    policy_rejected: at("policy_rejected_logps"),
                    ref_chosen: at("ref_chosen_logps"),
                    ref_rejected: at("ref_rejected_logps"),
                    chosen_tokens: at("chosen_tokens") as usize,
                    rejected_tokens: at("rejected_tokens") as usize,
                });
                let rpo = objective.rpo_alpha / chosen_tokens;
                for (ours, field) in [
                    (found.loss, "pair_loss"),
                    (found.reward_chosen, "rewards_chosen"),
                    (found.reward_rejected, "rewards_rejected"),
                    (found.d_chosen / n - rpo, "d_chosen"),
                    (found.d_rejected / n, "d_rejected"),
                ] {
                    let tolerance = 1e-12 * at(field).abs().max(1.0);
                    assert!(
                        (ours - at(field)).abs() <= tolerance,
                        "{field}: {ours} in {batch}"
                    );
                }
                pairs += 1;
            }
        }
        assert!(pairs > 20);
    }
}
