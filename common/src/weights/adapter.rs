//! LoRA adapters in PEFT's layout: merged into their base while it is read, and written.

use super::config_json::{Fields, shortest};
use super::layout::{Place, in_order};
use super::safetensors::Shards;
use super::save::{write_json, write_safetensors};
use super::{Config, Weights, text_part};
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// What tells an adapter's folder from a model's.
pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// PEFT puts two wrappers around the model that it adapts.
const PREFIX: &str = "base_model.model.";

/// Options that do not change what the stored tensors mean, or that are read here. Any other option
/// must be off (null, false, 0, empty): PEFT grows by options that change the forward pass.
const UNDERSTOOD: [&str; 28] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "parent_library",
    "auto_mapping",
    "megatron_core",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
];

/// An opened adapter: for each adapted weight, its two factors and their scale.
pub(super) struct Adapter {
    shards: Shards,
    /// By the name of the weight that they change, as a folder has it.
    factors: HashMap<String, Factors>,
}

/// W + scale · B·A, with A `[rank, in]` and B `[out, rank]`.
struct Factors {
    a: Place,
    b: Place,
    rank: usize,
    scale: f32,
}

/// What an adapter's config says about its base, as a MODEL argument.
pub(super) fn base_of(config: &Value, path: &Path) -> Result<String> {
    let at = || path.display().to_string();
    let fields = Fields(config.as_object().with_context(at)?);
    let base = fields
        .text("base_model_name_or_path")
        .with_context(at)?
        .with_context(|| format!("{}: \"base_model_name_or_path\" is missing", path.display()))?;
    let revision = fields.text("revision").with_context(at)?;
    Ok(match revision {
        Some(revision) if !Path::new(base).exists() => format!("{base}@{revision}"),
        _ => base.to_owned(),
    })
}

impl Adapter {
    /// Opens the adapter in `folder` against the weights that its base has. What it adapts of a model that reads images
    /// beside its text part does not count.
    pub(super) fn open(folder: &Path, config: &Value, base: &Weights) -> Result<Self> {
        let path = folder.join(CONFIG);
        let settings = Settings::read(config).with_context(|| path.display().to_string())?;
        let file = folder.join(WEIGHTS);
        ensure!(
            file.is_file(),
            "{}: missing; an adapter in pickled form (.bin) is never opened, save it again with a newer peft",
            file.display()
        );
        let shards = Shards::open_file(&file)?;
        let shapes: HashMap<_, _> = base.config.stored_parameters().into_iter().collect();
        let mut factors = HashMap::new();
        let of_text = |a: &String| !base.is_text_part() || text_part::is_in(a);
        for a in shards.names().into_iter().filter(of_text) {
            let Some(module) = a.strip_suffix(".lora_A.weight") else {
                let paired = a
                    .strip_suffix(".lora_B.weight")
                    .is_some_and(|m| shards.shape(&format!("{m}.lora_A.weight")).is_some());
                ensure!(
                    paired,
                    "{}: the tensor {a:?} is not one of a pair lora_A.weight, lora_B.weight: only plain LoRA on projections is supported",
                    file.display()
                );
                continue;
            };
            let adapted = module.strip_prefix(PREFIX).unwrap_or(module);
            let weight = format!("{}.weight", text_part::plain(adapted));
            let shape = shapes
                .get(&weight)
                .filter(|shape| shape.len() == 2)
                .with_context(|| {
                    format!(
                        "{}: {a:?} adapts {weight:?}, which the base does not have as a projection",
                        file.display()
                    )
                })?;
            let (rank, scale) = settings.of(adapted);
            let a = Place::whole(&a, &[rank, shape[1]]);
            let b = Place::whole(&format!("{module}.lora_B.weight"), &[shape[0], rank]);
            shards.check(&a)?;
            shards.check(&b)?;
            factors.insert(weight, Factors { a, b, rank, scale });
        }
        Ok(Self { shards, factors })
    }

    /// Adds the adapter's part to a weight of the base, `[out, in]`.
    pub(super) fn merge(
        &self,
        config: &Config,
        name: &str,
        shape: &[usize],
        values: &mut [f32],
    ) -> Result<()> {
        let place = config.place(name, shape);
        let (Some(factors), &[_, input]) = (self.factors.get(&place.name), shape) else {
            return Ok(());
        };
        let a = self.shards.read(&factors.a)?;
        let mut b = self.shards.read(&Place {
            rows: place.rows,
            ..factors.b.clone()
        })?;
        if let Some(order) = config.order(name) {
            b = in_order(&b, &order, factors.rank);
        }
        values
            .par_chunks_mut(input)
            .zip(b.par_chunks(factors.rank))
            .for_each_init(
                || vec![0.0f32; input],
                |delta, (row, b)| {
                    delta.fill(0.0);
                    for (b, a) in b.iter().zip(a.chunks(input)) {
                        for (delta, a) in delta.iter_mut().zip(a) {
                            *delta += b * a;
                        }
                    }
                    for (value, delta) in row.iter_mut().zip(delta) {
                        *value += factors.scale * *delta;
                    }
                },
            );
        Ok(())
    }
}

/// Rank and α of every module.
#[derive(Debug, PartialEq)]
struct Settings {
    rank: usize,
    alpha: f64,
    /// Scales are α/√r instead of α/r.
    rslora: bool,
    /// Modules (ends of their names) that have another rank or α.
    ranks: Vec<(String, usize)>,
    alphas: Vec<(String, f64)>,
}

impl Settings {
    /// Rank and scale of a module, by its name in the base.
    fn of(&self, module: &str) -> (usize, f32) {
        let rank = of_pattern(&self.ranks, module).unwrap_or(self.rank);
        let alpha = of_pattern(&self.alphas, module).unwrap_or(self.alpha);
        let divisor = match self.rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        (rank, (alpha / divisor) as f32)
    }

    fn read(config: &Value) -> Result<Self> {
        let fields = Fields(config.as_object().context("must be a JSON object")?);
        for (key, wanted) in [
            ("peft_type", "LORA"),
            ("task_type", "CAUSAL_LM"),
            ("bias", "none"),
        ] {
            if let Some(found) = fields.text(key)? {
                ensure!(
                    found == wanted,
                    "{key}: {found:?} is not supported, only {wanted:?}"
                );
            }
        }
        if let Some(Value::String(init)) = fields.present("init_lora_weights") {
            // The others (pissa, olora, corda, …) change the base's weights before training.
            ensure!(
                ["gaussian", "orthogonal", "eva"].contains(&init.as_str()),
                "init_lora_weights: {init:?} adapts a changed base; convert the adapter to plain LoRA with peft first"
            );
        }
        for (key, value) in fields.0 {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::String(text) => text.is_empty(),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Bool(true) => false,
            };
            ensure!(
                off || UNDERSTOOD.contains(&key.as_str()),
                "{key}: this PEFT option is not supported; merge the adapter with peft's merge_and_unload first"
            );
        }
        let numbers = |key: &str| pattern(&fields, key);
        let whole = |(module, rank): (String, f64)| {
            ensure!(
                rank >= 1.0 && rank.fract() == 0.0 && rank < 1e6,
                "rank_pattern: {module}: must be a whole number above 0, not {rank}"
            );
            Ok((module, rank as usize))
        };
        Ok(Self {
            rank: fields.size("r")?,
            alpha: fields
                .number("lora_alpha")?
                .context("\"lora_alpha\" is missing")?,
            rslora: fields.flag("use_rslora")?.unwrap_or(false),
            ranks: numbers("rank_pattern")?
                .into_iter()
                .map(whole)
                .collect::<Result<_>>()?,
            alphas: numbers("alpha_pattern")?,
        })
    }
}

/// `rank_pattern` or `alpha_pattern`: modules with numbers of their own.
fn pattern(fields: &Fields, key: &str) -> Result<Vec<(String, f64)>> {
    let Some(value) = fields.present(key) else {
        return Ok(vec![]);
    };
    let map = value
        .as_object()
        .with_context(|| format!("{key}: must be an object, not {value}"))?;
    let entry = |module: &String| {
        // PEFT takes them as regular expressions.
        ensure!(
            module
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_.".contains(c)),
            "{key}: {module:?} is a pattern, which is not supported, only names are"
        );
        let number = Fields(map).number(module).context(key.to_owned())?;
        let number = number.with_context(|| format!("{key}: {module}: is null"))?;
        Ok((module.clone(), number))
    };
    map.keys().map(entry).collect()
}

/// The first whose name is that of the module, or its end.
fn of_pattern<T: Copy>(pattern: &[(String, T)], module: &str) -> Option<T> {
    let names = |name: &str| {
        module
            .strip_suffix(name)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    pattern
        .iter()
        .find(|(name, _)| names(name))
        .map(|&(_, value)| value)
}

/// A trained LoRA pair.
pub struct LoraModule<'a> {
    /// The module that it adapts, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns and rows of the adapted weight.
    pub input: usize,
    pub output: usize,
    /// `[rank, input]`
    pub a: Cow<'a, [f32]>,
    /// `[output, rank]`
    pub b: Cow<'a, [f32]>,
}

/// Writes an adapter in PEFT's layout into the folder `dir`, which exists: `adapter_config.json` and
/// `adapter_model.safetensors`, float32. The adapted weight is W + (alpha/rank)·B·A; `base` is
/// what another program will open to find W (a folder or a hub id), of this `config`. Modules that are one in the base become
/// one whose rank is the sum of theirs.
///
/// # Errors
/// No modules, a pair whose sizes do not fit, the disk's own.
pub fn save_adapter(
    dir: &Path,
    base: &str,
    config: &Config,
    rank: usize,
    alpha: f32,
    modules: Vec<LoraModule>,
) -> Result<()> {
    if modules.is_empty() {
        bail!("an adapter without modules cannot be saved")
    }
    let mut stored: Vec<LoraModule> = vec![];
    for module in modules {
        let (name, b) = as_stored(config, rank, &module);
        match stored.last_mut().filter(|last| last.name == name) {
            Some(last) => last.append(b, &module),
            None => stored.push(LoraModule { name, b, ..module }),
        }
    }
    let mut patterns = [Map::new(), Map::new()];
    let mut targets = BTreeSet::new();
    for module in &stored {
        // PEFT matches these against the ends of the modules' names.
        let target = module.name.rsplit('.').next().unwrap_or(&module.name);
        targets.insert(target);
        let times = module.a.len() / (rank * module.input);
        if times > 1 {
            patterns[0].insert(target.to_owned(), json!(times * rank));
            patterns[1].insert(target.to_owned(), whole_or_real(times as f32 * alpha));
        }
    }
    let [rank_pattern, alpha_pattern] = patterns;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": whole_or_real(alpha),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "modules_to_save": null,
        "use_rslora": false,
        "inference_mode": true,
    });
    write_json(&dir.join(CONFIG), &config)?;
    let tensors = stored.iter().flat_map(|module| {
        let name = |which: &str| format!("{PREFIX}{}.lora_{which}.weight", module.name);
        let rank = module.a.len() / module.input;
        [
            (
                name("A"),
                vec![rank, module.input],
                Cow::Borrowed(&*module.a),
            ),
            (
                name("B"),
                vec![module.output, rank],
                Cow::Borrowed(&*module.b),
            ),
        ]
    });
    let layout: Vec<_> = tensors
        .clone()
        .map(|(name, shape, _)| (name, shape))
        .collect();
    write_safetensors(&dir.join(WEIGHTS), &layout, &mut tensors.map(Ok))
}

fn whole_or_real(alpha: f32) -> Value {
    match alpha.fract() == 0.0 {
        true => json!(alpha as i64),
        false => shortest(alpha),
    }
}

/// The name of a module in a folder, and its B with rows as they are there.
fn as_stored<'a>(
    config: &Config,
    rank: usize,
    module: &LoraModule<'a>,
) -> (String, Cow<'a, [f32]>) {
    let weight = format!("{}.weight", module.name);
    let place = config.place(&weight, &[module.output, module.input]);
    let b = config.stored_rows(&weight, &[module.output, rank], module.b.clone());
    (place.name.trim_end_matches(".weight").to_owned(), b)
}

impl LoraModule<'_> {
    /// Becomes the adapter of its rows and another's below them: A has all of both, B a block for each.
    fn append(&mut self, below: Cow<[f32]>, other: &LoraModule) {
        let (above, added) = (self.a.len() / self.input, other.a.len() / other.input);
        let mut b = Vec::with_capacity((self.output + other.output) * (above + added));
        for row in self.b.chunks(above) {
            b.extend_from_slice(row);
            b.resize(b.len() + added, 0.0);
        }
        for row in below.chunks(added) {
            b.resize(b.len() + above, 0.0);
            b.extend_from_slice(row);
        }
        self.a.to_mut().extend_from_slice(&other.a);
        self.b = b.into();
        self.output += other.output;
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::*;
    use super::super::{read_json, save};
    use super::*;
    use std::fs;

    const NAME: &str = "model.layers.1.self_attn.q_proj";

    /// An adapter of rank 2 for a 32×32 projection.
    fn module(name: &str) -> LoraModule<'static> {
        let a: Vec<f32> = (0..64).map(|i| i as f32 / 8.0).collect();
        let b: Vec<f32> = (0..64).map(|i| 4.0 - i as f32 / 8.0).collect();
        LoraModule {
            name: name.to_owned(),
            input: 32,
            output: 32,
            a: a.into(),
            b: b.into(),
        }
    }

    /// A base, and an adapter for one of its projections.
    fn adapted() -> (tempfile::TempDir, Tensors, tempfile::TempDir) {
        let (base, _, tensors) = checkpoint("llama");
        let adapter = tempfile::tempdir().unwrap();
        let path = base.path().to_str().unwrap();
        save_adapter(
            adapter.path(),
            path,
            &config("llama"),
            2,
            3.0,
            vec![module(NAME)],
        )
        .unwrap();
        (base, tensors, adapter)
    }

    /// As PEFT adapts a matrix that is three projections to us: one A, and B's rows in the order of the file.
    #[test]
    fn adapters_of_fused_projections_open_and_are_written_as_such() {
        let mut json = config_json("phi3");
        json["partial_rotary_factor"] = json!(0.5);
        let config = Config::from_json(&json, Path::new("config.json")).unwrap();
        let tensors = random_tensors(&config, 7);
        let (base, adapter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        save(base.path(), &config, None, borrowed(&tensors)).unwrap();
        let of = |name: &str, output: usize, seed: usize| {
            let value = |i: usize| ((i * 7 + seed) % 11) as f32 / 4.0 - 1.0;
            LoraModule {
                name: format!("model.layers.0.{name}"),
                input: 32,
                output,
                a: (0..64).map(value).collect(),
                b: (0..2 * output).map(|i| value(i + 3)).collect(),
            }
        };
        let modules = || {
            vec![
                of("self_attn.q_proj", 32, 1),
                of("self_attn.k_proj", 16, 2),
                of("self_attn.v_proj", 16, 5),
                of("mlp.gate_proj", 64, 4),
                of("mlp.up_proj", 64, 8),
            ]
        };
        let path = base.path().to_str().unwrap();
        save_adapter(adapter.path(), path, &config, 2, 3.0, modules()).unwrap();
        let written = read_json(&adapter.path().join(CONFIG)).unwrap();
        assert_eq!(
            written["target_modules"],
            json!(["gate_up_proj", "qkv_proj"])
        );
        assert_eq!(
            written["rank_pattern"],
            json!({"qkv_proj": 6, "gate_up_proj": 4})
        );
        assert_eq!(
            written["alpha_pattern"],
            json!({"qkv_proj": 9, "gate_up_proj": 6})
        );
        let shards = Shards::open_file(&adapter.path().join(WEIGHTS)).unwrap();
        let qkv = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight";
        assert_eq!(shards.shape(qkv).unwrap(), [64, 6]);
        let merged = open(adapter.path()).unwrap();
        for (name, shape, base) in &tensors {
            let found = merged.tensor(name, shape).unwrap();
            let module = modules()
                .into_iter()
                .find(|m| format!("{}.weight", m.name) == *name);
            for (at, (found, base)) in found.iter().zip(base).enumerate() {
                let delta = module.as_ref().map_or(0.0, |m| {
                    let (row, column) = (at / m.input, at % m.input);
                    (0..2)
                        .map(|k| m.b[2 * row + k] * m.a[32 * k + column])
                        .sum()
                });
                assert!((found - (base + 1.5 * delta)).abs() < 1e-4, "{name}[{at}]");
            }
        }
    }

    /// GLM-4's: row 1 of a head is turned with row 0, which it follows in the file; in the decoder half a head lies between.
    #[test]
    fn adapters_of_heads_that_turn_neighbours_have_rows_as_the_file_has_them() {
        let (base, config, tensors) = checkpoint("glm4");
        let adapter = tempfile::tempdir().unwrap();
        let path = base.path().to_str().unwrap();
        save_adapter(adapter.path(), path, &config, 2, 3.0, vec![module(NAME)]).unwrap();
        let shards = Shards::open_file(&adapter.path().join(WEIGHTS)).unwrap();
        let b = format!("{PREFIX}{NAME}.lora_B.weight");
        let stored = shards.read(&Place::whole(&b, &[32, 2])).unwrap();
        let row = |of: &[f32], row: usize| of[2 * row..][..2].to_vec();
        for (theirs, ours) in [0, 4, 1, 5, 2, 3, 6, 7].into_iter().enumerate() {
            for head in 0..4 {
                let ours = row(&module(NAME).b, 8 * head + ours);
                assert_eq!(row(&stored, 8 * head + theirs), ours);
            }
        }
        assert_merged(adapter.path(), &tensors, 1.5);
    }

    #[test]
    fn modules_may_have_ranks_and_alphas_of_their_own() {
        let (_base, tensors, adapter) = adapted();
        edit(adapter.path(), "r", json!(8));
        edit(adapter.path(), "lora_alpha", json!(1));
        edit(
            adapter.path(),
            "rank_pattern",
            json!({"k_proj": 5, "self_attn.q_proj": 2}),
        );
        edit(adapter.path(), "alpha_pattern", json!({"q_proj": 3}));
        assert_merged(adapter.path(), &tensors, 1.5);
    }

    fn edit(adapter: &Path, key: &str, value: Value) {
        let path = adapter.join(CONFIG);
        let mut json = read_json(&path).unwrap();
        json[key] = value;
        fs::write(path, json.to_string()).unwrap();
    }

    fn assert_merged(adapter: &Path, tensors: &Tensors, scale: f32) {
        let weights = open(adapter).unwrap();
        for (name, shape, base) in tensors {
            let found = weights.tensor(name, shape).unwrap();
            if *name != format!("{NAME}.weight") {
                assert_eq!(&found, base, "{name}");
                continue;
            }
            for (at, (found, base)) in found.iter().zip(base).enumerate() {
                let (row, column) = (at / 32, at % 32);
                let delta: f32 = (0..2)
                    .map(|k| (4.0 - (2 * row + k) as f32 / 8.0) * ((32 * k + column) as f32 / 8.0))
                    .sum();
                let expected = base + scale * delta;
                assert!((found - expected).abs() < 1e-4, "{at}: {found} {expected}");
            }
        }
    }

    /// As PEFT names what it adapts when the base was loaded with its images.
    #[test]
    fn an_adapter_of_a_model_with_images_serves_its_text_part() {
        let (alone, tensors, adapter) = adapted();
        let whole = text_part::testing::wrapped(alone.path(), text_part::Names::Before);
        let text = NAME.replacen("model.", "model.language_model.", 1);
        let modules = [module(&text), module("model.vision_tower.q_proj")];
        let base = whole.path().to_str().unwrap();
        save_adapter(
            adapter.path(),
            base,
            &config("llama"),
            2,
            3.0,
            modules.into(),
        )
        .unwrap();
        assert_merged(adapter.path(), &tensors, 1.5);
    }

    #[test]
    fn an_adapter_opens_as_its_merged_model() {
        let (base, tensors, adapter) = adapted();
        assert_merged(adapter.path(), &tensors, 1.5);
        let merged = open(adapter.path()).unwrap();
        assert_eq!(merged.path(), base.path(), "the tokenizer is the base's");
        let plain = open(base.path()).unwrap();
        assert_ne!(merged.fingerprint().unwrap(), plain.fingerprint().unwrap());
        edit(adapter.path(), "use_rslora", json!(true));
        assert_merged(adapter.path(), &tensors, 3.0 / 2f32.sqrt());
    }

    /// Every field that PEFT 0.21 writes for plain LoRA, most of them off.
    #[test]
    fn pefts_own_config_is_understood() {
        let config = json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": "x", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
            "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
            "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 3, "lora_bias": false, "lora_dropout": 0.1,
            "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
            "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2,
            "rank_pattern": {}, "revision": null, "target_modules": ["up_proj", "q_proj"], "target_parameters": null,
            "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
            "use_qalora": false, "use_rslora": false, "velora_config": null,
        });
        assert_eq!(
            Settings::read(&config)
                .unwrap()
                .of("model.layers.0.mlp.up_proj"),
            (2, 1.5)
        );
        assert_eq!(base_of(&config, Path::new("c")).unwrap(), "x");
        let pinned = json!({"base_model_name_or_path": "org/name", "revision": "v1"});
        assert_eq!(base_of(&pinned, Path::new("c")).unwrap(), "org/name@v1");
    }

    #[test]
    fn what_is_written_is_pefts_layout() {
        let (base, _, adapter) = adapted();
        let json = read_json(&adapter.path().join(CONFIG)).unwrap();
        for (key, value) in [
            ("peft_type", json!("LORA")),
            ("task_type", json!("CAUSAL_LM")),
            ("r", json!(2)),
            ("lora_alpha", json!(3)),
            ("target_modules", json!(["q_proj"])),
            ("bias", json!("none")),
            ("base_model_name_or_path", json!(base.path())),
        ] {
            assert_eq!(json[key], value, "{key}");
        }
        let shards = Shards::open_file(&adapter.path().join(WEIGHTS)).unwrap();
        let a = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
        assert_eq!(shards.shape(a).unwrap(), [2, 32]);
        assert_eq!(
            shards.shape(&a.replace("lora_A", "lora_B")).unwrap(),
            [32, 2]
        );
        assert!(save_adapter(adapter.path(), "x", &config("llama"), 2, 3.0, vec![]).is_err());
    }

    #[test]
    fn options_that_mean_something_else_are_refused_by_name() {
        for (key, value) in [
            ("peft_type", json!("IA3")),
            ("task_type", json!("SEQ_CLS")),
            ("bias", json!("all")),
            ("use_dora", json!(true)),
            ("fan_in_fan_out", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({"q_proj": 0})),
            ("rank_pattern", json!({"layers\\.[0-3]\\..*": 4})),
            ("alpha_pattern", json!({"q_proj": "4"})),
            ("init_lora_weights", json!("pissa")),
            ("some_option_of_tomorrow", json!(true)),
            ("lora_alpha", json!(null)),
            ("r", json!(3)),
            ("base_model_name_or_path", json!(null)),
            ("base_model_name_or_path", json!("/nowhere/at/all")),
        ] {
            let (_base, _, adapter) = adapted();
            edit(adapter.path(), key, value.clone());
            let line = error(adapter.path());
            let named = if key == "r" {
                "has shape [2, 32], but"
            } else {
                key
            };
            assert!(
                line.contains(named) && line.contains("adapter_"),
                "{key}: {line}"
            );
        }
    }

    #[test]
    fn an_adapter_of_itself_or_without_its_weights_is_refused() {
        let (_base, _, adapter) = adapted();
        edit(
            adapter.path(),
            "base_model_name_or_path",
            json!(adapter.path()),
        );
        assert!(error(adapter.path()).contains("is an adapter itself"));
        // A model beside it: perhaps the merged one, which the adapter is not for.
        let (base, _, adapter) = adapted();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(base.path().join(file), adapter.path().join(file)).unwrap();
        }
        assert!(error(adapter.path()).contains("holds a model and an adapter"));
        let (_base, _, adapter) = adapted();
        fs::remove_file(adapter.path().join(WEIGHTS)).unwrap();
        assert!(error(adapter.path()).contains("adapter_model.safetensors: missing"));
    }

    #[test]
    fn tensors_that_are_no_pair_on_a_projection_are_refused() {
        for (name, shape, wanted) in [
            (
                "base_model.model.lm_head.lora_embedding_A",
                vec![2, 4],
                "is not one of a pair",
            ),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                vec![32, 2],
                "is not one of a pair",
            ),
            (
                "base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight",
                vec![2, 32],
                "does not have as a projection",
            ),
            (
                "base_model.model.model.norm.lora_A.weight",
                vec![2, 32],
                "does not have as a projection",
            ),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                vec![2, 32],
                "lora_B.weight\" is missing",
            ),
        ] {
            let (_base, _, adapter) = adapted();
            let values = vec![0.0; shape.iter().product()];
            let tensor = (name.to_owned(), shape.clone(), Cow::Owned(values));
            let mut tensors = std::iter::once(Ok(tensor));
            let layout = [(name.to_owned(), shape)];
            write_safetensors(&adapter.path().join(WEIGHTS), &layout, &mut tensors).unwrap();
            let line = error(adapter.path());
            assert!(line.contains(wanted), "{name}: {line}");
        }
    }
}
