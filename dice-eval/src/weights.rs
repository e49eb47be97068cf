//! Length-controlled win rates of models of which only the three fitted weights are stored.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use common::jsonl::rows;
use common::metrics::length_control::{Weights, controlled};
use serde::Deserialize;
use serde_json::{Map, json, to_value};

use crate::covariates::Covariates;
use crate::format::{Line, points};

/// A row of AlpacaEval's weights/…/baseline_*.csv: the model's name is pandas' unnamed index.
#[derive(Deserialize)]
struct Record {
    #[serde(alias = "")]
    model: String,
    #[serde(flatten)]
    weights: Weights,
}

/// One line per stored model.
pub fn lines(file: &Path, covariates: &Covariates) -> Result<Vec<Line>> {
    let difficulties = covariates.all_difficulties()?;
    let stored = read(file).context("--weights")?;
    ensure!(!stored.is_empty(), "--weights: {} is empty", file.display());
    let lines = stored.into_iter().map(|(model, weights)| {
        let (lc, error) =
            controlled(&weights, difficulties.iter().copied()).context("no difficulties")?;
        let mut json = Map::new();
        json.insert("model".into(), json!(model));
        json.insert("length_controlled_winrate".into(), json!(lc));
        json.insert("lc_standard_error".into(), json!(error));
        json.insert("n_total".into(), json!(difficulties.len()));
        json.insert("lc_form".into(), json!("stored_weights"));
        json.insert("glm_weights".into(), to_value(weights)?);
        let cells = vec![
            ("model", model),
            ("length-controlled", points(Some(lc), None, 2)),
        ];
        Ok(Line { json, cells })
    });
    lines.collect()
}

fn read(file: &Path) -> Result<Vec<(String, Weights)>> {
    if file.extension().is_some_and(|extension| extension == "csv") {
        let open = || format!("cannot open {}", file.display());
        let reader = BufReader::new(File::open(file).with_context(open)?);
        let records = csv::Reader::from_reader(reader).into_deserialize();
        return records
            .map(|record| {
                let Record { model, weights } =
                    record.map_err(|err| anyhow!("{}: {err}", file.display()))?;
                Ok((model, weights))
            })
            .collect();
    }
    rows(&[file.to_owned()])
        .map(|row| {
            let row = row?;
            let weights = row.fields.get("glm_weights").cloned().unwrap_or_default();
            let weights = serde_json::from_value(weights).map_err(|err| {
                row.error("glm_weights", format_args!("is no set of weights: {err}"))
            })?;
            Ok((row.string("model")?.to_owned(), weights))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::testing::{alpaca_eval, eval, models};
    use serde_json::json;

    #[test]
    fn published_rates_come_from_published_weights() {
        let Some(data) = alpaca_eval() else { return };
        let dir = tempfile::tempdir().unwrap();
        let (csv, jsonl) = (dir.path().join("w.csv"), dir.path().join("w.jsonl"));
        let mut table =
            ",np.tanh(std_delta_len),instruction_difficulty,not_gamed_baseline.astype(float)\n"
                .to_owned();
        let mut rows = String::new();
        for (name, _, expected) in models(&data) {
            let weights = &expected["published"]["glm_weights"];
            let [phi, theta, psi] =
                ["phi_length", "theta_difficulty", "psi_model"].map(|w| &weights[w]);
            table += &format!("{name},{phi},{theta},{psi}\n");
            rows += &format!("{}\n", json!({"model": name, "glm_weights": weights}));
        }
        std::fs::write(&csv, table).unwrap();
        std::fs::write(&jsonl, rows).unwrap();
        let difficulty = data
            .join("instruction_difficulty.csv")
            .display()
            .to_string();
        for file in [csv, jsonl] {
            let file = file.display().to_string();
            let got = eval(
                "win-rate",
                ["--difficulty", &difficulty, "--weights", &file],
            )
            .unwrap();
            assert_eq!(got.len(), 8);
            for (row, (name, _, expected)) in got.iter().zip(models(&data)) {
                assert_eq!(row["model"], name);
                let published = expected["published"]["length_controlled_winrate"]
                    .as_f64()
                    .unwrap();
                let rate = row["length_controlled_winrate"].as_f64().unwrap();
                // text_davinci_001 was published over its 803 rows.
                let tolerance = if name == "text_davinci_001" {
                    0.05
                } else {
                    1e-6
                };
                assert!(
                    (rate - published).abs() < tolerance,
                    "{name} {rate} {published}"
                );
            }
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("w.jsonl");
        std::fs::write(
            &file,
            "{\"model\":\"m\",\"glm_weights\":{\"phi_length\":1}}\n",
        )
        .unwrap();
        let file = file.display().to_string();
        let message = format!("{:#}", eval("win-rate", ["--weights", &file]).unwrap_err());
        assert!(message.contains("--difficulty"), "{message}");
        let table = dir.path().join("d.csv");
        std::fs::write(&table, "index,instruction_difficulty\n0,0\n").unwrap();
        let table = table.display().to_string();
        let words = ["--weights", &file, "--difficulty", &table];
        let message = format!("{:#}", eval("win-rate", words).unwrap_err());
        assert!(
            message.contains("w.jsonl:1: field \"glm_weights\""),
            "{message}"
        );
    }
}
