//! How files have what the decoder knows otherwise: projections that are one matrix there (Phi-3), norms under other names
//! (GLM-4), experts under other names or all in one tensor, perhaps turned and gates and ups by turns (gpt-oss), and the rows of
//! heads that are rotated in another order or in part.

use super::config::{Config, SELECTION};
use super::family::{self, ExpertFiles, Fused};
use super::save::{Given, Named};
use anyhow::ensure;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Where a file has a tensor of the decoder's: as rows of one of its own, mostly all of them. (Rows are those of all
/// matrices, where it has several.)
#[derive(Clone)]
pub(super) struct Place {
    pub name: String,
    /// As the file has it.
    pub shape: Vec<usize>,
    pub rows: Range<usize>,
    /// The numbers of a row.
    pub row: usize,
    /// Its row r is row `turns`·r + `turn` of those of `turns` tensors, which follow each other but for that.
    pub turn: usize,
    pub turns: usize,
    /// The matrix of those rows is turned in the file: they are its columns.
    pub turned: bool,
}

/// The rows of a shape, and their length.
fn rows_of(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [len] => (*len, 1),
        [rows @ .., row] => (rows.iter().product(), *row),
    }
}

impl Place {
    /// A tensor that is one in the file, too.
    pub fn whole(name: &str, shape: &[usize]) -> Self {
        let (rows, row) = rows_of(shape);
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            rows: 0..rows,
            row,
            turn: 0,
            turns: 1,
            turned: false,
        }
    }

    /// A tensor of the shape `of` that is rows of one of the file's, from this row on.
    pub fn part(name: String, shape: Vec<usize>, first: usize, of: &[usize]) -> Self {
        let whole = Self::whole(&name, &shape);
        Self {
            rows: first..first + of[0],
            row: of[1..].iter().product(),
            ..whole
        }
    }

    /// The numbers in its rows.
    pub fn len(&self) -> usize {
        self.rows.len() * self.row
    }

    /// The rows of the file's tensor.
    pub fn all_rows(&self) -> usize {
        self.shape.iter().product::<usize>() / self.row
    }

    /// Those of them that its own are among: no others, where rows do not take turns.
    fn among(&self) -> Range<usize> {
        let first = self.rows.start - self.turn * self.rows.len();
        first..first + self.turns * self.rows.len()
    }

    /// Its row of this number among those.
    pub fn row_among(&self, row: usize) -> usize {
        row * self.turns + self.turn
    }

    /// Where among the numbers of those the file has that of this row and column.
    fn at(&self, row: usize, column: usize) -> usize {
        let row = self.row_among(row);
        match self.turned {
            true => column * self.among().len() + row,
            false => row * self.row + column,
        }
    }

    /// Those of the bytes of the file's tensor that have its rows, and those that take turns with them.
    pub fn bytes_of<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let (among, all) = (self.among(), self.all_rows());
        let at = |row: usize| bytes.len() / all * row;
        match among.len() == all {
            true => bytes,
            false => &bytes[at(among.start)..at(among.end)],
        }
    }

    /// Whether its numbers follow each other in the file as they do in the decoder.
    pub fn is_as_it_is(&self) -> bool {
        self.turns == 1 && !self.turned
    }

    /// Its numbers, of those that [`Self::bytes_of`] are of.
    pub fn taken(&self, values: Vec<f32>) -> Vec<f32> {
        if self.is_as_it_is() {
            return values;
        }
        let mut taken = vec![0.0; self.len()];
        let rows = taken.par_chunks_mut(self.row).enumerate();
        rows.for_each(|(row, to)| {
            for (column, to) in to.iter_mut().enumerate() {
                *to = values[self.at(row, column)];
            }
        });
        taken
    }

    /// Puts its numbers where the file's tensor has them.
    fn put(&self, values: &[f32], whole: &mut [f32]) {
        let among = self.among();
        let matrix = &mut whole[among.start * self.row..among.end * self.row];
        if self.is_as_it_is() {
            return matrix.copy_from_slice(values);
        }
        for (row, from) in values.chunks_exact(self.row).enumerate() {
            for (column, from) in from.iter().enumerate() {
                matrix[self.at(row, column)] = *from;
            }
        }
    }

    /// Whether the file has it as a tensor.
    fn is_whole(&self) -> bool {
        self.rows.len() == self.all_rows() && self.is_as_it_is()
    }

    /// Whether it ends where the file's tensor does.
    pub fn is_last(&self) -> bool {
        self.rows.end == self.all_rows()
    }
}

impl Config {
    /// Where a Hugging Face folder has a tensor.
    pub(super) fn place(&self, name: &str, shape: &[usize]) -> Place {
        let family = family::of(&self.model_type);
        if let Some(mixture) = family.and_then(|family| family.mixture.as_ref()) {
            if let Some(expert) = Expert::of(name) {
                return self.place_of_expert(&mixture.files, expert, shape);
            }
            if let Some((layer, (stored, before))) =
                name.strip_suffix(SELECTION).zip(mixture.selection)
            {
                return Place::whole(&format!("{layer}{stored}"), &[before, shape].concat());
            }
        }
        let (fused, renamed) = family.map_or((&[][..], &[][..]), |f| (f.fused, f.renamed));
        let place = self.place_in(fused, name, shape);
        let other = (renamed.iter()).find(|(ours, _)| name.contains(&format!(".{ours}.")));
        match other {
            Some((ours, theirs)) => Place {
                name: place.name.replace(ours, theirs),
                ..place
            },
            None => place,
        }
    }

    /// Where a tensor is that may be rows of one of these, by the decoder's own name where it is not.
    pub(super) fn place_in(&self, fused: &[Fused], name: &str, shape: &[usize]) -> Place {
        let found = fused.iter().find_map(|(whole, parts)| {
            let holds = |part: &&&str| name.contains(&format!(".{part}."));
            Some((whole, parts, parts.iter().find(holds)?))
        });
        let Some((whole, parts, part)) = found else {
            return Place::whole(name, shape);
        };
        let rows = |module: &str| {
            // (Where projections are one matrix, all layers are alike.)
            let attention = self.attention_projections(0).into_iter();
            let shared = self.shared_projections().into_iter().flatten();
            let mut all = attention.chain(self.mlp_projections(0)).chain(shared);
            let (_, rows, ..) = all.find(|p| p.0 == module).expect("parts are projections");
            rows
        };
        let before = parts.iter().take_while(|other| *other != part);
        let first = before.map(|module| rows(module)).sum();
        let all = parts.iter().map(|module| rows(module)).sum();
        let file = [&[all], &shape[1..]].concat();
        Place::part(name.replace(part, whole), file, first, shape)
    }

    fn place_of_expert(&self, files: &ExpertFiles, expert: Expert, shape: &[usize]) -> Place {
        let Expert {
            layer,
            number,
            projection,
            kind,
        } = expert;
        match files {
            ExpertFiles::Each(experts, names) => {
                let module = names[projection as usize];
                Place::whole(&format!("{layer}{experts}.{number}.{module}.{kind}"), shape)
            }
            ExpertFiles::Together(names) => self.place_together(names, &expert, shape),
            ExpertFiles::Interleaved => self.place_interleaved(&expert, shape),
        }
    }

    /// Among those of all, whose matrices are turned, and whose gates and ups take turns.
    fn place_interleaved(&self, expert: &Expert, shape: &[usize]) -> Place {
        let mut place = self.place_together(&IN_MEMORY, expert, shape);
        match expert.kind {
            "bias" => place.name += "_bias",
            _ => {
                place.shape.swap(1, 2);
                place.turned = true;
            }
        }
        (place.turn, place.turns) = match expert.projection {
            ExpertPart::Down => (0, 1),
            part => (part as usize, 2),
        };
        place
    }

    /// Where an expert's tensor is in those of all, of these names: gates and ups, and downs.
    fn place_together(&self, names: &[&str; 2], expert: &Expert, shape: &[usize]) -> Place {
        let (name, each, first) = match expert.projection {
            ExpertPart::Down => (names[1], shape[0], 0),
            part => (names[0], 2 * shape[0], part as usize * shape[0]),
        };
        let experts = self.mixture().map_or(1, |experts| experts.count);
        let file = [&[experts, each], &shape[1..]].concat();
        let name = format!("{}{name}", expert.layer);
        Place::part(name, file, expert.number * each + first, shape)
    }

    /// Where files have an expert's tensor that have all of them in one, as transformers has them in memory; None for any other
    /// tensor. (So Qwen3.5's were published; they are saved each by itself.)
    pub(super) fn place_as_in_memory(&self, name: &str, shape: &[usize]) -> Option<Place> {
        Some(self.place_together(&IN_MEMORY, &Expert::of(name)?, shape))
    }

    /// [`Self::parameters`] as a Hugging Face folder has them.
    pub(super) fn stored_parameters(&self) -> Vec<Named> {
        let places = self.parameters().into_iter();
        let places = places.map(|(name, shape)| self.place(&name, &shape));
        let last = places.filter(Place::is_last);
        last.map(|place| (place.name, place.shape)).collect()
    }

    /// The tensors of [`Self::parameters`] (or others of their shapes, such as gradients), in that order, as a Hugging Face
    /// folder has them.
    pub fn stored<'a>(
        &self,
        mut tensors: impl Iterator<Item = Given<'a>>,
    ) -> impl Iterator<Item = Given<'a>> {
        let next = move || {
            let (mut whole, mut filled) = (vec![], 0);
            loop {
                let given = tensors.next()?;
                let placed = given.and_then(|(name, shape, values)| {
                    let place = self.place(&name, &shape);
                    let begun = place.rows.start * place.row;
                    ensure!(filled == begun, "{name:?} is not where it belongs");
                    Ok((place, self.stored_rows(&name, &shape, values)))
                });
                match placed {
                    Err(error) => return Some(Err(error)),
                    Ok((place, values)) if place.is_whole() => {
                        return Some(Ok((place.name, place.shape, values)));
                    }
                    Ok((place, values)) => {
                        whole.resize(place.shape.iter().product(), 0.0);
                        place.put(&values, &mut whole);
                        filled += values.len();
                        if place.is_last() {
                            return Some(Ok((place.name, place.shape, whole.into())));
                        }
                    }
                }
            }
        };
        std::iter::from_fn(next)
    }

    /// A tensor's rows in the order of a Hugging Face folder.
    pub(super) fn stored_rows<'a>(
        &self,
        name: &str,
        shape: &[usize],
        values: Cow<'a, [f32]>,
    ) -> Cow<'a, [f32]> {
        match self.order(name) {
            None => values,
            Some(order) => {
                let mut inverse = vec![0; order.len()];
                for (ours, &theirs) in order.iter().enumerate() {
                    inverse[theirs] = ours;
                }
                in_order(&values, &inverse, row_of(name, shape)).into()
            }
        }
    }

    /// For each row of a head of this tensor (or of the whole tensor), where a Hugging Face folder has it there; None where it
    /// is in its place.
    pub(super) fn order(&self, name: &str) -> Option<Vec<usize>> {
        let neighbours = family::of(&self.model_type).is_some_and(|family| family.neighbours);
        let (head, turning) = (self.head_dim, self.rotary_dim);
        let other = (neighbours || turning < head) && is_turned(name);
        let order = || order_of_rows(head, turning, neighbours);
        if !(self.attention_gate && name.contains("self_attn.q_proj.")) {
            return other.then(order);
        }
        // Files have each head's queries and then its gates; the decoder has all queries and then all gates.
        let each = |first: usize| (0..self.heads).map(move |h| (2 * h + first) * head);
        let queries = each(0).flat_map(|start| order().into_iter().map(move |i| start + i));
        let gates = each(1).flat_map(|start| start..start + head);
        Some(queries.chain(gates).collect())
    }
}

/// For each row of a head, where a file has it.
///
/// The decoder turns row i with row i + head_dim/2, all of them. Of heads that turn in part (`partial_rotary_factor`), files
/// have those that turn first, and the others, which the decoder turns by nothing, after them. Those that turn together are
/// halves there, or neighbours: rows 2i and 2i + 1. (Scores do not depend on an order that queries and keys share.)
pub(super) fn order_of_rows(head: usize, turning: usize, neighbours: bool) -> Vec<usize> {
    let still = (head - turning) / 2;
    let place = |row: usize| match (row / (head / 2), row % (head / 2)) {
        (half, i) if i >= turning / 2 => turning + half * still + i - turning / 2,
        (half, i) if neighbours => 2 * i + half,
        (half, i) => half * turning / 2 + i,
    };
    (0..head).map(place).collect()
}

/// Gates and ups of all experts, and their downs, as transformers has them in memory.
const IN_MEMORY: [&str; 2] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];

/// What a tensor is to a mixture of experts, by its name: one expert's projection, or the bias of that.
pub(super) struct Expert<'a> {
    /// The layer's prefix.
    pub layer: &'a str,
    pub number: usize,
    pub projection: ExpertPart,
    /// `weight` or `bias`.
    pub kind: &'a str,
}

/// The projections of an expert, in the order of [`ExpertFiles`].
#[derive(Clone, Copy)]
pub(super) enum ExpertPart {
    Gate,
    Up,
    Down,
}

impl<'a> Expert<'a> {
    /// None for any other tensor.
    pub fn of(name: &'a str) -> Option<Self> {
        let (layer, rest) = name.split_once("mlp.experts.")?;
        let (number, module) = rest.split_once('.')?;
        let (projection, kind) = module.split_once('.')?;
        Some(Self {
            layer,
            number: number.parse().ok()?,
            projection: match projection {
                "gate_proj" => ExpertPart::Gate,
                "up_proj" => ExpertPart::Up,
                "down_proj" => ExpertPart::Down,
                _ => return None,
            },
            kind: ["weight", "bias"]
                .into_iter()
                .find(|known| *known == kind)?,
        })
    }
}

/// Whether a tensor makes what is rotated.
pub(super) fn is_turned(name: &str) -> bool {
    let turned = ["q_proj.", "k_proj.", "q_norm.", "k_norm."];
    let module = name
        .split_once("self_attn.")
        .map_or("", |(_, module)| module);
    turned.iter().any(|turned| module.starts_with(turned))
}

/// How long the rows of a tensor are that [`Config::order`] speaks of: of norms each number is one, also where heads have norms
/// of their own, `[heads, head_dim]`.
pub(super) fn row_of(name: &str, shape: &[usize]) -> usize {
    match name.ends_with("norm.weight") {
        true => 1,
        false => shape[1..].iter().product(),
    }
}

/// Each head's rows taken from where `order` says; `row` is a row's length (1 for a bias).
pub(super) fn in_order(values: &[f32], order: &[usize], row: usize) -> Vec<f32> {
    let mut taken = vec![0.0; values.len()];
    let head = order.len() * row;
    (taken.par_chunks_mut(head).zip(values.par_chunks(head))).for_each(|(to, from)| {
        for (to, &place) in to.chunks_mut(row).zip(order) {
            to.copy_from_slice(&from[place * row..][..row]);
        }
    });
    taken
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::*;
    use super::super::{read_json, save};
    use super::*;
    use serde_json::json;
    use std::fs;

    /// Half of a head of 8 is rotated.
    fn partial() -> Config {
        let mut json = config_json("phi3");
        json["partial_rotary_factor"] = json!(0.5);
        Config::from_json(&json, std::path::Path::new("config.json")).unwrap()
    }

    #[test]
    fn projections_are_rows_of_what_files_have() {
        let config = config("phi3");
        let rows = |module: &str, rows: usize| {
            let name = format!("model.layers.1.{module}.weight");
            let place = config.place(&name, &[rows, 32]);
            (place.name, place.shape, place.rows)
        };
        let qkv = |rows| {
            (
                "model.layers.1.self_attn.qkv_proj.weight".to_owned(),
                vec![64, 32],
                rows,
            )
        };
        assert_eq!(rows("self_attn.q_proj", 32), qkv(0..32));
        assert_eq!(rows("self_attn.k_proj", 16), qkv(32..48));
        assert_eq!(rows("self_attn.v_proj", 16), qkv(48..64));
        let gate_up = (
            "model.layers.1.mlp.gate_up_proj.weight".to_owned(),
            vec![128, 32],
            64..128,
        );
        assert_eq!(rows("mlp.up_proj", 64), gate_up);
        let down = config.place("model.layers.1.mlp.down_proj.weight", &[32, 64]);
        assert!(down.is_whole() && down.is_last());
        let stored = config.stored_parameters();
        let names: Vec<_> = stored
            .iter()
            .filter_map(|(name, _)| name.strip_prefix("model.layers.0."))
            .collect();
        assert_eq!(
            names,
            [
                "self_attn.qkv_proj.weight",
                "self_attn.o_proj.weight",
                "mlp.gate_up_proj.weight",
                "mlp.down_proj.weight",
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
            ]
        );
    }

    #[test]
    fn experts_have_the_names_and_rows_that_files_give_them() {
        let place = |config: &Config, name: &str, shape: [usize; 2]| {
            let place = config.place(&format!("model.layers.1.{name}.weight"), &shape);
            let name = place.name.trim_start_matches("model.layers.1.").to_owned();
            (name, place.shape, place.rows)
        };
        let mixtral = config("mixtral");
        let up = place(&mixtral, "mlp.experts.2.up_proj", [64, 32]);
        let name = "block_sparse_moe.experts.2.w3.weight";
        assert_eq!(up, (name.to_owned(), vec![64, 32], 0..64));
        let router = place(&mixtral, "mlp.gate", [3, 32]);
        let name = "block_sparse_moe.gate.weight";
        assert_eq!(router, (name.to_owned(), vec![3, 32], 0..3));
        let granite = config("granitemoe");
        let input = |rows| {
            let name = "block_sparse_moe.input_linear.weight".to_owned();
            (name, vec![3, 128, 32], rows)
        };
        let gate_or_up = |name: &str| place(&granite, name, [64, 32]);
        assert_eq!(gate_or_up("mlp.experts.0.gate_proj"), input(0..64));
        assert_eq!(gate_or_up("mlp.experts.1.up_proj"), input(192..256));
        let down = place(&granite, "mlp.experts.2.down_proj", [32, 64]);
        let name = "block_sparse_moe.output_linear.weight";
        assert_eq!(down, (name.to_owned(), vec![3, 32, 64], 64..96));
        let stored = granite.stored_parameters();
        let names = stored
            .iter()
            .filter(|(name, _)| name.contains(".1.block_sparse_moe"));
        assert_eq!(names.count(), 3);
        let hunyuan = config("hunyuan_v1_moe");
        let router = place(&hunyuan, "mlp.gate", [3, 32]);
        assert_eq!(router.0, "mlp.gate.wg.weight");
        let shared = place(&hunyuan, "mlp.shared_expert.up_proj", [64, 32]);
        assert_eq!(shared.0, "mlp.shared_mlp.up_proj.weight");
        let shared = place(
            &config("granitemoeshared"),
            "mlp.shared_expert.up_proj",
            [40, 32],
        );
        let name = "shared_mlp.input_linear.weight";
        assert_eq!(shared, (name.to_owned(), vec![80, 32], 40..80));
        let mut json = config_json("gemma4_text");
        json["enable_moe_block"] = json!(true);
        json["num_experts"] = json!(3);
        json["top_k_experts"] = json!(2);
        json["moe_intermediate_size"] = json!(24);
        let gemma = Config::from_json(&json, std::path::Path::new("config.json")).unwrap();
        let up = place(&gemma, "mlp.experts.1.up_proj", [24, 32]);
        let name = "experts.gate_up_proj".to_owned();
        assert_eq!(up, (name, vec![3, 48, 32], 72..96));
        let router = place(&gemma, "mlp.gate", [3, 32]);
        assert_eq!(router.0, "router.proj.weight");
        let beside = place(&gemma, "mlp.gate_proj", [64, 32]);
        assert_eq!(beside.0, "mlp.gate_proj.weight");
        let place = config("ernie4_5_moe").place(&format!("model.layers.1.{SELECTION}"), &[3]);
        let name = "model.layers.1.mlp.moe_statics.e_score_correction_bias";
        assert_eq!((place.name.as_str(), place.shape), (name, vec![1, 3]));
        // All of the rows are whole in the file that is written.
        let (folder, _, tensors) = checkpoint("granitemoe");
        assert_holds(&open(folder.path()).unwrap(), &tensors);
    }

    /// As transformers has them in memory, which is how Qwen3.5's were published.
    #[test]
    fn experts_may_be_in_one_tensor() {
        let (folder, config, tensors) = checkpoint("qwen3_5_moe_text");
        let path = folder.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut stored: Vec<(String, Vec<usize>, Vec<u8>)> = vec![];
        for (name, shape, _) in &tensors {
            let usual = file.tensor(&config.place(name, shape).name).unwrap();
            let place = config.place_as_in_memory(name, shape);
            let place = place.unwrap_or(Place::whole(name, usual.shape()));
            let at = stored.iter().position(|(name, ..)| *name == place.name);
            let at = at.unwrap_or_else(|| {
                let len = 4 * place.shape.iter().product::<usize>();
                stored.push((place.name.clone(), place.shape.clone(), vec![0; len]));
                stored.len() - 1
            });
            let first = place.rows.start * usual.data().len() / place.rows.len();
            stored[at].2[first..][..usual.data().len()].copy_from_slice(usual.data());
        }
        assert!(
            stored
                .iter()
                .any(|(name, ..)| name.ends_with("1.mlp.experts.gate_up_proj"))
        );
        let views = stored.iter().map(|(name, shape, bytes)| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            (name, view.unwrap())
        });
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        assert_holds(&open(folder.path()).unwrap(), &tensors);
    }

    /// As transformers saved it: an expert's matrix is turned, and gates and ups are its columns by turns.
    #[test]
    fn experts_may_be_turned_with_gates_and_ups_by_turns() {
        let weights = open(&golden("gpt-oss")).unwrap();
        let bytes = fs::read(golden("gpt-oss").join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let experts = |name: &str| {
            let tensor = file.tensor(&format!("model.layers.1.mlp.experts.{name}"));
            let (values, _) = tensor.as_ref().unwrap().data().as_chunks();
            let values: Vec<_> = values.iter().copied().map(f32::from_le_bytes).collect();
            (tensor.unwrap().shape().to_vec(), values)
        };
        let mut held = 0;
        let mut holds = |module: &str, shape: &[usize], expected: Vec<f32>| {
            let name = format!("model.layers.1.mlp.{module}");
            assert_eq!(weights.tensor(&name, shape).unwrap(), expected, "{name}");
            weights
                .tensor_parts(&name, shape, &mut |part| {
                    assert_eq!(part, expected, "{name}");
                    Ok(())
                })
                .unwrap();
            held += 1;
        };
        let (hidden, ffn) = (32, 16);
        let (gate_up_shape, gate_up) = experts("gate_up_proj");
        let (down_shape, down) = experts("down_proj");
        assert_eq!(gate_up_shape, [8, hidden, 2 * ffn]);
        assert_eq!(down_shape, [8, ffn, hidden]);
        let (_, gate_up_bias) = experts("gate_up_proj_bias");
        let (_, down_bias) = experts("down_proj_bias");
        for expert in 0..8 {
            for (turn, part) in ["gate", "up"].into_iter().enumerate() {
                let of = |out: usize, input: usize| {
                    gate_up[(expert * hidden + input) * 2 * ffn + 2 * out + turn]
                };
                let rows = (0..ffn).flat_map(|out| (0..hidden).map(move |input| of(out, input)));
                let module = format!("experts.{expert}.{part}_proj");
                holds(&format!("{module}.weight"), &[ffn, hidden], rows.collect());
                let bias = (0..ffn).map(|out| gate_up_bias[expert * 2 * ffn + 2 * out + turn]);
                holds(&format!("{module}.bias"), &[ffn], bias.collect());
            }
            let of = |out: usize, input: usize| down[(expert * ffn + input) * hidden + out];
            let rows = (0..hidden).flat_map(|out| (0..ffn).map(move |input| of(out, input)));
            let module = format!("experts.{expert}.down_proj");
            holds(&format!("{module}.weight"), &[hidden, ffn], rows.collect());
            let bias = &down_bias[expert * hidden..][..hidden];
            holds(&format!("{module}.bias"), &[hidden], bias.to_vec());
        }
        let router = file.tensor("model.layers.1.mlp.router.bias").unwrap();
        let (values, _) = router.data().as_chunks();
        holds(
            "gate.bias",
            &[8],
            values.iter().copied().map(f32::from_le_bytes).collect(),
        );
        assert_eq!(held, 8 * 6 + 1);
        // Saved again, it is the file that it was.
        let tensors = all_tensors(&weights);
        let folder = tempfile::tempdir().unwrap();
        save(
            folder.path(),
            &weights.config,
            Some(&weights),
            borrowed(&tensors),
        )
        .unwrap();
        let saved = fs::read(folder.path().join("model.safetensors")).unwrap();
        let saved = safetensors::SafeTensors::deserialize(&saved).unwrap();
        assert_eq!(saved.len(), file.len());
        for (name, tensor) in file.tensors() {
            assert_eq!(saved.tensor(&name).unwrap(), tensor, "{name}");
        }
    }

    #[test]
    fn norms_have_the_names_that_files_give_them() {
        let stored = |family: &str, of: &str| {
            let of = format!("model.layers.0.{of}");
            let stored = config(family).stored_parameters().into_iter();
            let names = stored.filter_map(|(name, _)| Some(name.strip_prefix(&of)?.to_owned()));
            names
                .filter(|name| name.contains("norm"))
                .collect::<Vec<_>>()
        };
        // Before and after attention, before and after the MLP.
        assert_eq!(
            stored("glm4", ""),
            [
                "input_layernorm.weight",
                "post_self_attn_layernorm.weight",
                "post_attention_layernorm.weight",
                "post_mlp_layernorm.weight",
            ]
        );
        assert_eq!(
            stored("hunyuan_v1_dense", "self_attn."),
            ["query_layernorm.weight", "key_layernorm.weight"]
        );
    }

    /// transformers turns the first four rows of a head, 0 with 2 and 1 with 3; the decoder turns row i with i + 4.
    #[test]
    fn heads_that_turn_in_part_have_those_that_turn_first() {
        let order = partial()
            .order("model.layers.0.self_attn.k_proj.weight")
            .unwrap();
        assert_eq!(order, [0, 1, 4, 5, 2, 3, 6, 7]);
        assert!(
            partial()
                .order("model.layers.0.self_attn.v_proj.weight")
                .is_none()
        );
        assert_eq!(order_of_rows(8, 8, true), [0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(order_of_rows(8, 4, true), [0, 2, 4, 5, 1, 3, 6, 7]);
        assert_eq!(
            in_order(&[0.0, 1.0, 2.0, 3.0], &[1, 0], 2),
            [2.0, 3.0, 0.0, 1.0]
        );
    }

    /// Files have a head's queries and then its gates, head by head; and of heads that turn in part norms are in that order, too.
    #[test]
    fn gates_are_apart_from_the_queries() {
        let mut json = config_json("qwen3_5_text");
        json["num_attention_heads"] = json!(2);
        json["num_key_value_heads"] = json!(1);
        json["head_dim"] = json!(4);
        json["partial_rotary_factor"] = json!(0.5);
        let config = Config::from_json(&json, std::path::Path::new("config.json")).unwrap();
        let order = |name: &str| config.order(&format!("model.layers.1.self_attn.{name}.weight"));
        let queries = [0, 2, 1, 3, 8, 10, 9, 11];
        let gates = [4, 5, 6, 7, 12, 13, 14, 15];
        assert_eq!(order("q_proj").unwrap(), [queries, gates].concat());
        assert_eq!(order("k_proj").unwrap(), [0, 2, 1, 3]);
        assert_eq!(order("q_norm").unwrap(), [0, 2, 1, 3]);
        assert!(order("o_proj").is_none());
    }

    #[test]
    fn what_is_saved_is_as_the_family_has_it_and_opens_as_it_was() {
        for config in [config("phi3"), partial()] {
            let tensors = random_tensors(&config, 7);
            let folder = tempfile::tempdir().unwrap();
            save(folder.path(), &config, None, borrowed(&tensors)).unwrap();
            let weights = open(folder.path()).unwrap();
            assert_eq!(weights.config, config);
            assert_holds(&weights, &tensors);
            let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.len(), config.stored_parameters().len());
            let qkv = file
                .tensor("model.layers.0.self_attn.qkv_proj.weight")
                .unwrap();
            assert_eq!(qkv.shape(), [64, 32]);
            let first = |values: &[u8]| f32::from_le_bytes(values[..4].try_into().unwrap());
            let named = |name: &str| &tensors.iter().find(|t| t.0.ends_with(name)).unwrap().2;
            let row = |row: usize| first(&qkv.data()[4 * 32 * row..]);
            // Row 2 of a head that turns in half is our row 4: it is turned with row 0.
            let ours = if config == partial() { 4 } else { 2 };
            assert_eq!(row(2), named("0.self_attn.q_proj.weight")[32 * ours]);
            assert_eq!(row(48), named("0.self_attn.v_proj.weight")[0]);
            // Read in parts, too.
            for (name, shape, values) in &tensors {
                let mut parts = vec![];
                let mut take = |part: &[f32]| {
                    parts.extend_from_slice(part);
                    Ok(())
                };
                weights.tensor_parts(name, shape, &mut take).unwrap();
                assert_eq!(&parts, values, "{name}");
            }
        }
    }

    /// Those of a part are where its rows are, without a copy, unless their order is another.
    #[test]
    fn rows_that_are_stored_in_bfloat16_are_handed_over_as_bytes() {
        for config in [config("phi3"), partial()] {
            let tensors = random_tensors(&config, 7);
            let folder = tempfile::tempdir().unwrap();
            save(folder.path(), &config, None, borrowed(&tensors)).unwrap();
            let path = folder.path().join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            // The values are such that the upper halves of their words are they in bfloat16.
            let halved = |values: &[u8]| values.chunks(4).flat_map(|v| [v[2], v[3]]).collect();
            let tensor = |(name, view): (String, safetensors::tensor::TensorView)| {
                (name, view.shape().to_vec(), halved(view.data()))
            };
            let narrow: Vec<(_, _, Vec<u8>)> = file.tensors().into_iter().map(tensor).collect();
            let views = narrow.iter().map(|(name, shape, bytes)| {
                let dtype = safetensors::Dtype::BF16;
                (
                    name,
                    safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap(),
                )
            });
            let written = safetensors::serialize(views, None).unwrap();
            fs::write(&path, written).unwrap();
            let weights = open(folder.path()).unwrap();
            assert_holds(&weights, &tensors);
            for (name, shape, values) in &tensors {
                let wide: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let expected: Vec<u8> = halved(&wide);
                match weights.bfloat16_bytes(name, shape).unwrap() {
                    Some(found) => assert!(found == expected, "{name}"),
                    None => assert!(config == partial() && is_turned(name), "{name}"),
                }
            }
        }
    }

    #[test]
    fn what_is_not_of_the_config_is_named() {
        let (folder, config, mut tensors) = checkpoint("phi3");
        tensors.swap(1, 2); // queries and keys
        let given = borrowed(&tensors);
        let elsewhere = tempfile::tempdir().unwrap();
        let saved = save(elsewhere.path(), &config, None, given);
        let line = format!("{:#}", saved.unwrap_err());
        assert!(
            line.contains("k_proj.weight\" is not where it belongs"),
            "{line}"
        );
        let path = folder.path().join("config.json");
        let mut json = read_json(&path).unwrap();
        json["num_key_value_heads"] = json!(1);
        fs::write(&path, json.to_string()).unwrap();
        let line = error(folder.path());
        assert!(
            line.contains("qkv_proj.weight\" has shape [64, 32], but the config asks for [48, 32]"),
            "{line}"
        );
    }
}
