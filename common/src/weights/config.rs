//! A decoder's shape: what differs between model families, as data.

use super::family;
use super::rope::{QueryGrowth, Rope};
use crate::gguf;
use crate::kernels::activation::Activation;
use crate::kernels::layout::Heads;
use crate::kernels::{delta, gated_conv, norm};
use anyhow::{Result, ensure};

/// Where a layer has norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// On what attention and the MLP read.
    Before,
    /// On what they give to the residual stream (OLMo 2, arXiv 2501.00656).
    After,
    /// On both (Gemma 2 and 3).
    Around,
    /// One, on what attention and the MLP both read: the MLP does not see what attention gives (Cohere).
    Once,
}

impl Norms {
    /// Whether what sublayers give to the residual stream is normed.
    pub fn after(self) -> bool {
        matches!(self, Self::After | Self::Around)
    }
}

/// What of queries and keys is normed, before the rotation unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself, all by the same weight (Qwen3, Gemma 3).
    Heads,
    /// The same after the rotation (Hunyuan).
    Turned,
    /// All query heads of a token as one row, and all key heads (OLMo 2).
    Rows,
    /// Each head by itself, by a weight of its own, as the residual stream is (Command R+).
    Apart,
}

impl QkNorm {
    /// Whether each head is normed by itself, all by the same weight.
    pub fn by_heads(self) -> bool {
        matches!(self, Self::Heads | Self::Turned)
    }
}

/// A layer's MLP as a mixture of experts: a router scores them for a token, which goes to the best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token goes to.
    pub used: usize,
    /// Inner width of each.
    pub ffn: usize,
    /// What the router's logits are multiplied by, first.
    pub logit_scale: f32,
    /// What they become.
    pub scores: Scores,
    /// The best are those of the highest sums of a score and a number that each expert has for that alone (DeepSeek-V3,
    /// arXiv 2412.19437): it is kept as it is, no gradient reaches it.
    pub biased: bool,
    /// Whether scores of those that a token goes to are divided by their sum, or by this number where that is less.
    pub normed: Option<f32>,
    /// What is added to that sum.
    pub plus: f32,
    /// What they are multiplied by, last.
    pub scale: f32,
    /// One more expert, which all tokens go to.
    pub shared: Option<Shared>,
    /// Biases on the router and on the three projections of each expert (gpt-oss).
    pub biases: bool,
    /// Beside them layers have the MLP of layers without experts. It, they and the router read through a norm each; what it
    /// gives and what they give is normed before it becomes one; and each expert has a trained number that what it is worth
    /// to a token is multiplied by (Gemma 4).
    pub apart: bool,
}

/// What the router's logits become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Their soft-max.
    Softmax,
    /// The sigmoid of each.
    Sigmoid,
}

/// An expert that all tokens go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Its inner width.
    pub ffn: usize,
    /// What it gives counts by the sigmoid of a row of its own in the router; else it counts once.
    pub gated: bool,
}

impl Experts {
    /// How many experts a token goes to, the one for all of them included.
    pub fn each(&self) -> usize {
        self.used + usize::from(self.shared.is_some())
    }

    /// The inner widths of those together.
    pub fn width(&self) -> usize {
        self.used * self.ffn + self.shared.map_or(0, |shared| shared.ffn)
    }

    /// What a linear map has.
    fn kinds(&self) -> &'static [&'static str] {
        match self.biases {
            true => &["weight", "bias"],
            false => &["weight"],
        }
    }

    /// The rows of the router.
    pub fn outputs(&self) -> usize {
        self.count + usize::from(self.shared.is_some_and(|shared| shared.gated))
    }

    /// Its part of [`Config::arithmetic`].
    fn arithmetic(&self) -> String {
        let normed = self.normed.is_some();
        let (count, used) = (self.count, self.used);
        let mut text = format!(" Experts {{ count: {count}, used: {used}, normed: {normed} }}");
        if self.scores != Scores::Softmax {
            text += &format!(" scores {:?}", self.scores);
        }
        if let Some(least) = self.normed.filter(|&least| least != 0.0) {
            text += &format!(" normed {least:?}");
        }
        if self.plus != 0.0 {
            text += &format!(" plus {:?}", self.plus);
        }
        if self.scale != 1.0 {
            text += &format!(" experts_scale {:?}", self.scale);
        }
        if self.logit_scale != 1.0 {
            text += &format!(" router_scale {:?}", self.logit_scale);
        }
        if self.apart {
            text += " experts_apart";
        }
        text
    }
}

/// What a layer has in the place of attention: its past is a memory of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recurrence {
    /// Linear attention by the gated delta rule (Qwen3.5).
    Delta(delta::Shape),
    /// A short convolution between gates (LFM2).
    Conv(gated_conv::Shape),
}

impl Recurrence {
    /// Elements of a row of its fused projection.
    pub fn input_width(self) -> usize {
        match self {
            Self::Delta(shape) => shape.input_width(),
            Self::Conv(shape) => shape.input_width(),
        }
    }

    /// Elements of a row of what it gives to its output projection.
    pub fn output_width(self) -> usize {
        match self {
            Self::Delta(shape) => shape.value_width(),
            Self::Conv(shape) => shape.channels,
        }
    }

    /// The heads of linear attention, if it is that.
    pub fn delta(self) -> Option<delta::Shape> {
        match self {
            Self::Delta(shape) => Some(shape),
            Self::Conv(_) => None,
        }
    }

    fn check(self) -> Result<()> {
        match self {
            Self::Delta(shape) => shape.check(),
            Self::Conv(shape) => shape.check(),
        }
    }
}

/// Heads of layers that see all of the past, where they are other than those of layers with a window (Gemma 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WideHeads {
    /// Key and value heads.
    pub kv: usize,
    /// Width of a head, queries' too.
    pub dim: usize,
    /// Their values are their keys, before these are normed and rotated.
    pub keys_are_values: bool,
}

/// What a row of a layer's fused projection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fused {
    /// `[q | k | v]`.
    All,
    /// `[q | gate | k | v]`.
    Gated,
    /// `[q | k]`: values are the keys before norm and rotation.
    QueriesAndKeys,
    /// `[q]`: keys and values are an earlier layer's.
    Queries,
}

/// Name, rows, columns, and whether it has a bias.
pub(crate) type Projection = (&'static str, usize, usize, bool);

/// What Granite multiplies numbers by on their way, as its files say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Multipliers {
    /// Embeddings.
    pub embedding: f32,
    /// Scores, in the place of 1/√head_dim.
    pub attention: f32,
    /// What attention and the MLP add to the residual stream.
    pub residual: f32,
    /// What logits are divided by.
    pub logits: f32,
}

/// A decoder's shape. Differences between families are data here, not branches in the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// One of [`super::families`].
    pub model_type: String,
    /// Rows of the embedding (and of the LM head), tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// How much of a head is rotated: mostly all (Phi-4-mini: three quarters).
    pub rotary_dim: usize,
    /// Other heads of layers without a window.
    pub wide: Option<WideHeads>,
    /// So many of the last layers attend to the keys and values of the last layer before them that sees as far as they do
    /// (Gemma 3n and 4).
    pub sharing: usize,
    /// Inner width of the MLP in layers without experts, or beside them; where there are none, of each expert.
    pub ffn: usize,
    /// That of layers with keys of an earlier one.
    pub sharing_ffn: usize,
    /// Per layer: a mixture of experts, or None for one MLP. All mixtures of a model are alike.
    pub experts: Vec<Option<Experts>>,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Those of the residual stream, and [`QkNorm::Apart`], subtract the mean first (Cohere); else they are RMS norms, as all
    /// others are.
    pub norms_centred: bool,
    /// Longest sequence, tokens (`max_position_embeddings`; with LongRoPE `original_max_position_embeddings`).
    pub context: usize,
    /// The LM head is the embedding.
    pub tied: bool,
    /// What the embedding's rows are multiplied by where they begin the residual stream: 1, √hidden (Gemma), or as the config
    /// says (Granite).
    pub embed_scale: f32,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Each query head has a number that stands beside its scores in the soft-max, as that of a key without a value (gpt-oss).
    pub sinks: bool,
    /// What attention gives is multiplied by the sigmoid of gates, for which the query projection has as many rows again
    /// (Qwen3.5).
    pub attention_gate: bool,
    /// Per layer: what it has in the place of attention, or None for attention.
    pub recurrences: Vec<Option<Recurrence>>,
    /// Biases on the three projections of the MLP.
    pub mlp_bias: bool,
    pub norms: Norms,
    pub qk_norm: Option<QkNorm>,
    /// Value heads are normed, too, without a weight.
    pub values_normed: bool,
    /// Layers also read an embedding of their own of each token, so wide (Gemma 3n and 4).
    pub layer_inputs: Option<usize>,
    /// The residual stream is multiplied by a number after each layer, which is not trained.
    pub layer_scales: bool,
    /// What scores are multiplied by: 1/√head_dim, or as the config says (Gemma, Granite).
    pub attention_scale: f32,
    /// What scores are softly held within, as c·tanh(score / c) (Gemma 2).
    pub attention_cap: Option<f32>,
    /// The same for logits.
    pub logit_cap: Option<f32>,
    /// What logits are multiplied by: 1, or as the config says (Granite).
    pub logit_scale: f32,
    pub activation: Activation,
    /// Per layer: the attention's window in tokens, the query itself included (a query at position i
    /// sees keys j with i − window < j ≤ i), or None for all of the past.
    pub windows: Vec<Option<usize>>,
    /// Per layer: how queries and keys are rotated to their positions, or None for not at all (SmolLM3 leaves out some
    /// layers, arXiv 2501.18795; OLMo 3 and Gemma 3 rotate layers with a window otherwise than the rest).
    pub ropes: Vec<Option<Rope>>,
    /// How queries grow with their positions, in layers that rotate.
    pub query_growth: Option<QueryGrowth>,
}

impl Config {
    /// How the residual stream is normed.
    pub fn norm(&self) -> norm::Kind {
        norm::Kind {
            eps: self.norm_eps,
            centred: self.norms_centred,
        }
    }

    /// How heads, or all of them, are normed but for [`QkNorm::Apart`].
    pub fn rms_norm(&self) -> norm::Kind {
        norm::Kind {
            centred: false,
            ..self.norm()
        }
    }

    /// Whether attention and the MLP of a layer read the same.
    pub fn is_parallel(&self) -> bool {
        self.norms == Norms::Once
    }

    /// How the heads of a layer lie, what they see and how they score.
    pub fn heads_of(&self, layer: usize) -> Heads {
        Heads {
            query: self.heads,
            kv: self.wide_at(layer).map_or(self.kv_heads, |wide| wide.kv),
            dim: self.wide_at(layer).map_or(self.head_dim, |wide| wide.dim),
            window: self.windows[layer],
            scale: self.attention_scale,
            cap: self.attention_cap,
        }
    }

    /// A layer's other heads, where it has them.
    fn wide_at(&self, layer: usize) -> Option<WideHeads> {
        self.wide.filter(|_| self.windows[layer].is_none())
    }

    /// The width of a head in the layer where it is largest.
    pub fn widest_head(&self) -> usize {
        let dims = (0..self.layers).map(|layer| self.heads_of(layer).dim);
        dims.max().unwrap_or(0)
    }

    /// How much of a layer's heads is rotated.
    pub fn rotary_dim_of(&self, layer: usize) -> usize {
        self.wide_at(layer).map_or(self.rotary_dim, |wide| wide.dim)
    }

    /// The layer whose keys and values a layer attends to: mostly itself.
    pub fn keys_of(&self, layer: usize) -> usize {
        let own = self.layers - self.sharing;
        let alike = |&other: &usize| self.windows[other] == self.windows[layer];
        match layer < own {
            true => layer,
            false => (0..own).rev().find(alike).unwrap_or(layer),
        }
    }

    /// Whether other layers attend to a layer's keys and values, too.
    pub fn lends_keys(&self, layer: usize) -> bool {
        (layer + 1..self.layers).any(|other| self.keys_of(other) == layer)
    }

    /// What a row of the fused projection of a layer with attention is.
    pub fn fused(&self, layer: usize) -> Fused {
        let wide = self.wide_at(layer);
        if self.keys_of(layer) != layer {
            Fused::Queries
        } else if wide.is_some_and(|wide| wide.keys_are_values) {
            Fused::QueriesAndKeys
        } else if self.attention_gate {
            Fused::Gated
        } else {
            Fused::All
        }
    }

    /// The linear attention of layers that have that.
    pub fn deltas(&self) -> impl Iterator<Item = delta::Shape> {
        let recurrences = self.recurrences.iter().flatten();
        recurrences.filter_map(|recurrence| recurrence.delta())
    }

    /// What layers with a mixture of experts have, where there are some.
    pub fn mixture(&self) -> Option<Experts> {
        self.experts.iter().flatten().next().copied()
    }

    /// The inner widths of the MLPs that a token goes through in a layer, together.
    pub fn inner_width(&self, layer: usize) -> usize {
        match self.experts[layer] {
            None => self.ffn_of(layer),
            Some(experts) if experts.apart => experts.width() + self.ffn_of(layer),
            Some(experts) => experts.width(),
        }
    }

    /// That of the MLP in a layer without experts, or beside them.
    fn ffn_of(&self, layer: usize) -> usize {
        match self.keys_of(layer) == layer {
            true => self.ffn,
            false => self.sharing_ffn,
        }
    }

    /// That of the layer where it is largest.
    pub fn widest_mlp(&self) -> usize {
        let widths = (0..self.layers).map(|layer| self.inner_width(layer));
        widths.max().unwrap_or(0)
    }

    /// Every tensor of the model by its Hugging Face name, with its shape (row-major, `[out, in]`
    /// for projections), in the order of transformers' state dict. `lm_head.weight` only if untied.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab, self.hidden],
        )];
        for layer in 0..self.layers {
            self.layer_parameters(layer, &mut all);
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if let Some(width) = self.layer_inputs {
            let each = self.layers * width;
            for (name, shape) in [
                ("embed_tokens_per_layer", vec![self.vocab, each]),
                ("per_layer_model_projection", vec![each, self.hidden]),
                ("per_layer_projection_norm", vec![width]),
            ] {
                all.push((format!("model.{name}.weight"), shape));
            }
        }
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        all
    }

    /// The projections of attention in a layer.
    pub(crate) fn attention_projections(&self, layer: usize) -> Vec<Projection> {
        let (hidden, heads, fused) = (self.hidden, self.heads_of(layer), self.fused(layer));
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let gates = if fused == Fused::Gated { q } else { 0 };
        let keys = (fused != Fused::Queries).then_some(("self_attn.k_proj", kv));
        let values = matches!(fused, Fused::All | Fused::Gated).then_some(("self_attn.v_proj", kv));
        let read = [Some(("self_attn.q_proj", q + gates)), keys, values];
        (read.into_iter().flatten())
            .map(|(module, rows)| (module, rows, hidden, self.qkv_bias))
            .chain([("self_attn.o_proj", hidden, q, self.o_bias)])
            .collect()
    }

    /// Those of its MLP, where that is one, or beside experts.
    pub(super) fn mlp_projections(&self, layer: usize) -> [Projection; 3] {
        let (hidden, ffn) = (self.hidden, self.ffn_of(layer));
        [
            ("mlp.gate_proj", ffn, hidden, self.mlp_bias),
            ("mlp.up_proj", ffn, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, ffn, self.mlp_bias),
        ]
    }

    /// Those of the expert that all tokens go to, where there is one.
    pub(super) fn shared_projections(&self) -> Option<[Projection; 3]> {
        let (hidden, shared) = (self.hidden, self.mixture()?.shared?);
        Some([
            ("mlp.shared_expert.gate_proj", shared.ffn, hidden, false),
            ("mlp.shared_expert.up_proj", shared.ffn, hidden, false),
            ("mlp.shared_expert.down_proj", hidden, shared.ffn, false),
        ])
    }

    fn layer_parameters(&self, layer: usize, all: &mut Vec<(String, Vec<usize>)>) {
        let mut push = |name: &str, shape: Vec<usize>| {
            all.push((format!("model.layers.{layer}.{name}"), shape));
        };
        let plain = |push: &mut dyn FnMut(&str, Vec<usize>), projections: &[Projection]| {
            for &(module, out, input, bias) in projections {
                push(&format!("{module}.weight"), vec![out, input]);
                if bias {
                    push(&format!("{module}.bias"), vec![out]);
                }
            }
        };
        match self.recurrences[layer] {
            Some(Recurrence::Delta(shape)) => self.delta_parameters(shape, &mut push),
            Some(Recurrence::Conv(shape)) => self.conv_parameters(shape, &mut push),
            None => {
                plain(&mut push, &self.attention_projections(layer));
                self.qk_norm_parameters(layer, &mut push);
                if self.sinks {
                    push(SINKS, vec![self.heads]);
                }
            }
        }
        let experts = self.experts[layer];
        if experts.is_none_or(|experts| experts.apart) {
            plain(&mut push, &self.mlp_projections(layer));
        }
        if let Some(experts) = experts {
            self.expert_parameters(experts, &mut push);
        }
        for norm in self.layer_norms().into_iter().flatten() {
            push(&format!("{norm}.weight"), vec![self.hidden]);
        }
        if let Some(width) = self.layer_inputs {
            push("per_layer_input_gate.weight", vec![width, self.hidden]);
            push("per_layer_projection.weight", vec![self.hidden, width]);
            push("post_per_layer_input_norm.weight", vec![self.hidden]);
        }
        if self.layer_scales {
            push(LAYER_SCALE, vec![1]);
        }
    }

    fn expert_parameters(&self, experts: Experts, push: &mut dyn FnMut(&str, Vec<usize>)) {
        let (hidden, ffn, kinds) = (self.hidden, experts.ffn, experts.kinds());
        for (kind, shape) in kinds
            .iter()
            .zip([vec![experts.count, hidden], vec![experts.count]])
        {
            push(&format!("mlp.gate.{kind}"), shape);
        }
        if experts.biased {
            push(SELECTION, vec![experts.count]);
        }
        // Gates and ups of all of them, then downs: so files have them that have them as one.
        let gate_up = [("gate_proj", ffn, hidden), ("up_proj", ffn, hidden)];
        for part in [&gate_up[..], &[("down_proj", hidden, ffn)]] {
            for (kind, dims) in kinds.iter().zip([2, 1]) {
                for expert in 0..experts.count {
                    for &(module, out, input) in part {
                        push(
                            &format!("mlp.experts.{expert}.{module}.{kind}"),
                            [out, input][..dims].to_vec(),
                        );
                    }
                }
            }
        }
        for (module, out, input, _) in self.shared_projections().into_iter().flatten() {
            push(&format!("{module}.weight"), vec![out, input]);
        }
        if experts.outputs() > experts.count {
            push("mlp.shared_expert_gate.weight", vec![1, hidden]);
        }
        if experts.apart {
            let norms = APART_NORMS.into_iter();
            norms.for_each(|norm| push(norm, vec![hidden]));
            push(FACTORS, vec![experts.count]);
        }
    }

    fn qk_norm_parameters(&self, layer: usize, push: &mut dyn FnMut(&str, Vec<usize>)) {
        let heads = self.heads_of(layer);
        let (q, kv) = match self.qk_norm {
            None => return,
            Some(QkNorm::Heads | QkNorm::Turned) => (vec![heads.dim], vec![heads.dim]),
            Some(QkNorm::Rows) => (vec![heads.q_width()], vec![heads.kv_width()]),
            Some(QkNorm::Apart) => (vec![heads.query, heads.dim], vec![heads.kv, heads.dim]),
        };
        push("self_attn.q_norm.weight", q);
        if self.fused(layer) != Fused::Queries {
            push("self_attn.k_norm.weight", kv);
        }
    }

    fn delta_parameters(&self, shape: delta::Shape, push: &mut dyn FnMut(&str, Vec<usize>)) {
        let (heads, values) = (shape.value_heads, shape.value_width());
        for (name, shape) in [
            ("dt_bias", vec![heads]),
            ("A_log", vec![heads]),
            ("conv1d.weight", vec![shape.qkv_width(), 1, shape.kernel]),
            ("norm.weight", vec![shape.value_dim]),
            ("out_proj.weight", vec![self.hidden, values]),
            ("in_proj_qkv.weight", vec![shape.qkv_width(), self.hidden]),
            ("in_proj_z.weight", vec![values, self.hidden]),
            ("in_proj_b.weight", vec![heads, self.hidden]),
            ("in_proj_a.weight", vec![heads, self.hidden]),
        ] {
            push(&format!("linear_attn.{name}"), shape);
        }
    }

    fn conv_parameters(&self, shape: gated_conv::Shape, push: &mut dyn FnMut(&str, Vec<usize>)) {
        let channels = shape.channels;
        push("conv.conv.weight", vec![channels, 1, shape.kernel]);
        push("conv.in_proj.weight", vec![3 * channels, self.hidden]);
        push("conv.out_proj.weight", vec![self.hidden, channels]);
    }

    /// The names of a layer's norms on the residual stream: before and after attention, before and after the MLP.
    /// (One name means different things in different families.)
    pub fn layer_norms(&self) -> [Option<&'static str>; 4] {
        match self.norms {
            Norms::Before => [
                Some("input_layernorm"),
                None,
                Some("post_attention_layernorm"),
                None,
            ],
            Norms::After => [
                None,
                Some("post_attention_layernorm"),
                None,
                Some("post_feedforward_layernorm"),
            ],
            Norms::Around => [
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ],
            Norms::Once => [Some("input_layernorm"), None, None, None],
        }
    }

    /// The model with these multipliers. A residual stream that is divided by the factor of all that it gains gains that
    /// as it is, and norms see no difference but in their epsilon: so the decoder needs none.
    pub(super) fn multiplied(self, by: Multipliers) -> Self {
        Self {
            norm_eps: self.norm_eps / (by.residual * by.residual),
            embed_scale: by.embedding / by.residual,
            attention_scale: by.attention,
            logit_scale: 1.0 / by.logits,
            ..self
        }
    }

    /// What a tensor of a Hugging Face folder is short of: Gemma's norms multiply by 1 + weight, and are held as what they
    /// multiply by. (So do Qwen3.5's, but for those of what the delta rule reads.)
    pub(super) fn stored_short_of(&self, name: &str) -> f32 {
        match family::of(&self.model_type).is_some_and(|f| f.norms_from_one) {
            true if name.ends_with("norm.weight") && !name.contains("linear_attn") => 1.0,
            _ => 0.0,
        }
    }

    /// Whether a folder has a tensor rounded: less 1, what is below a half keeps not all of its digits.
    pub fn is_rounded(&self, name: &str) -> bool {
        self.stored_short_of(name) != 0.0
    }

    /// What of the config changes the numbers beyond the tensors' own shapes, as text for the fingerprint. (What came
    /// later is named where it differs from the rest only, so that older fingerprints stay.)
    pub(super) fn arithmetic(&self) -> String {
        let mut text = format!(
            "heads {} kv_heads {} head_dim {} eps {:?} tied {} activation {:?} windows {:?}",
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.norm_eps,
            self.tied,
            self.activation,
            self.windows,
        );
        let rotating: Vec<_> = self.ropes.iter().flatten().collect();
        match &rotating[..] {
            [] => {}
            [rope, others @ ..] if others.iter().all(|other| other == rope) => {
                text += &format!(" rope {rope:?}");
            }
            _ => text += &format!(" ropes {rotating:?}"),
        }
        if self.ropes.contains(&None) {
            let rotates: Vec<_> = self.ropes.iter().map(Option::is_some).collect();
            text += &format!(" rotates {rotates:?}");
        }
        if let Some(growth) = self.query_growth {
            text += &format!(" {growth:?}");
        }
        if self.rotary_dim != self.head_dim {
            text += &format!(" rotary_dim {}", self.rotary_dim);
        }
        if self.qk_norm == Some(QkNorm::Turned) {
            text += " qk_norm Turned";
        }
        if self.norms != Norms::Before {
            text += &format!(" norms {:?}", self.norms);
        }
        if self.norms_centred {
            text += " centred";
        }
        if self.embed_scale != 1.0 {
            text += &format!(" embed_scale {:?}", self.embed_scale);
        }
        if self.attention_scale != plain_scale(self.head_dim) {
            text += &format!(" attention_scale {:?}", self.attention_scale);
        }
        for (name, cap) in [
            ("attention_cap", self.attention_cap),
            ("logit_cap", self.logit_cap),
        ] {
            if let Some(cap) = cap {
                text += &format!(" {name} {cap:?}");
            }
        }
        if self.logit_scale != 1.0 {
            text += &format!(" logit_scale {:?}", self.logit_scale);
        }
        if let Some(experts) = self.mixture() {
            text += &experts.arithmetic();
        }
        if self.experts.contains(&None) && self.mixture().is_some() {
            let sparse: Vec<_> = self.experts.iter().map(Option::is_some).collect();
            text += &format!(" sparse {sparse:?}");
        }
        if self.attention_gate {
            text += " attention_gate";
        }
        if let Some(wide) = self.wide {
            text += &format!(" {wide:?}");
        }
        if self.sharing != 0 {
            text += &format!(" sharing {}", self.sharing);
        }
        if self.values_normed {
            text += " values_normed";
        }
        let recurrences = self.recurrences.iter();
        let deltas: Vec<_> = recurrences.map(|r| r.and_then(Recurrence::delta)).collect();
        if deltas.iter().any(Option::is_some) {
            text += &format!(" deltas {deltas:?}");
        } else if self.recurrences.iter().any(Option::is_some) {
            text += &format!(" recurrences {:?}", self.recurrences);
        }
        text.replace(", truncate: true", "") + "\n"
    }

    /// The bounds that the arithmetic relies on; also the guard of sizes against overflow and absurd allocations. The context
    /// becomes what all rotations reach.
    pub(super) fn checked(self) -> Result<Self> {
        let narrow = (self.kv_heads, self.head_dim);
        let wide = self.wide.map_or(narrow, |wide| (wide.kv, wide.dim));
        let sizes = [
            ("vocabulary", self.vocab, 1 << 24),
            ("hidden size", self.hidden, 1 << 20),
            ("number of attention heads", self.heads, 1 << 12),
            ("number of key/value heads", self.kv_heads, 1 << 12),
            ("head dimension", self.head_dim, 1 << 12),
            ("number of key/value heads of all the past", wide.0, 1 << 12),
            ("head dimension of all the past", wide.1, 1 << 12),
            ("MLP size", self.ffn, 1 << 22),
            ("MLP size", self.sharing_ffn, 1 << 22),
            ("context", self.context, 1 << 30),
        ];
        for (what, size, most) in sizes {
            ensure!(
                (1..=most).contains(&size),
                "the {what} is {size}, outside 1 to {most}"
            );
        }
        for (kv, dim) in [narrow, wide] {
            ensure!(
                self.heads.is_multiple_of(kv),
                "{} attention heads cannot share {kv} key/value heads evenly",
                self.heads,
            );
            ensure!(
                dim.is_multiple_of(2),
                "the head dimension {dim} is odd: rotary positions need pairs"
            );
        }
        ensure!(
            self.sharing < self.layers
                && (self.layers - self.sharing..self.layers).all(|i| self.keys_of(i) != i),
            "{} layers are to have keys of earlier ones, but no layer before them sees as far as they do",
            self.sharing
        );
        if let Some(width) = self.layer_inputs {
            ensure!(
                (1..=1 << 16).contains(&width),
                "the size of what layers read of each token is {width}, outside 1 to {}",
                1 << 16
            );
        }
        ensure!(
            self.rotary_dim.is_multiple_of(2) && (2..=self.head_dim).contains(&self.rotary_dim),
            "{} of {} dimensions of a head are to be rotated: that is not an even part of it",
            self.rotary_dim,
            self.head_dim
        );
        if let Some(experts) = self.mixture() {
            let (count, used) = (experts.count, experts.used);
            ensure!(
                (1..=count).contains(&used),
                "{used} of {count} experts for a token: these are no numbers of experts"
            );
            for ffn in [Some(experts.ffn), experts.shared.map(|shared| shared.ffn)] {
                ensure!(
                    ffn.is_none_or(|ffn| (1..=1 << 22).contains(&ffn)),
                    "an expert's size is {}, outside 1 to {}",
                    ffn.unwrap_or(0),
                    1 << 22
                );
            }
            ensure!(
                count <= MOST_EXPERTS / self.layers,
                "{count} experts in each of {} layers are more than {MOST_EXPERTS}",
                self.layers
            );
        }
        for recurrence in self.recurrences.iter().flatten() {
            recurrence.check()?;
        }
        for (layer, rope) in self.ropes.iter().enumerate() {
            if let Some(rope) = rope {
                rope.check(self.rotary_dim_of(layer) / 2)?;
            }
        }
        ensure!(
            self.norm_eps.is_finite() && self.norm_eps > 0.0,
            "the norm's epsilon {} is not a positive number",
            self.norm_eps
        );
        let ends = self.ropes.iter().flatten().filter_map(Rope::end);
        Ok(Self {
            context: ends.fold(self.context, usize::min),
            ..self
        })
    }
}

/// What stands beside scores in the soft-max.
pub(crate) const SINKS: &str = "self_attn.sinks";

/// What decides beside the scores which experts are the best.
pub(crate) const SELECTION: &str = "mlp.gate.e_score_correction_bias";

/// The norms that [`Experts::apart`] speaks of: of what the router reads, and experts; of what the MLP beside them gives, and they.
pub(crate) const APART_NORMS: [&str; 4] = [
    "router.scale",
    "pre_feedforward_layernorm_2.weight",
    "post_feedforward_layernorm_1.weight",
    "post_feedforward_layernorm_2.weight",
];

/// The numbers that it speaks of.
pub(crate) const FACTORS: &str = "router.per_expert_scale";

/// What the residual stream is multiplied by after a layer.
pub(crate) const LAYER_SCALE: &str = "layer_scalar";

/// Experts of all layers together: each has tensors with names.
const MOST_EXPERTS: usize = 1 << 16;

/// 1/√head_dim.
pub(super) fn plain_scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// The number of layers is held to a bound before anything is allocated for each.
pub(super) fn bounded_layers(layers: usize) -> Result<usize> {
    ensure!(
        (1..=gguf::MOST_LAYERS).contains(&layers),
        "the number of layers is {layers}, outside 1 to {}",
        gguf::MOST_LAYERS
    );
    Ok(layers)
}
