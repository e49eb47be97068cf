//! Where every parameter lies: one flat buffer of float32, with the matrices that are multiplied together side by side.

use crate::kernels::gemm::Mat;
use crate::kernels::{delta, gated_conv};
use crate::weights::{
    APART_NORMS, Config, Experts, FACTORS, Fused, LAYER_SCALE, Recurrence, SELECTION, SINKS,
    Weights,
};
use anyhow::Result;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

/// Parameters that are used as one, contiguous in the flat buffer: one tensor, or several stacked along their rows.
#[derive(Clone, Debug)]
pub struct Span {
    /// Its place in the flat buffer.
    pub range: Range<usize>,
    /// The tensors in it by their Hugging Face names, with their shapes.
    pub tensors: Vec<(String, Vec<usize>)>,
}

impl Span {
    /// Its tensors, each as a span of its own.
    pub fn parts(&self) -> impl Iterator<Item = Self> {
        let mut at = self.range.start;
        self.tensors.iter().map(move |tensor| {
            let start = at;
            at += tensor.1.iter().product::<usize>();
            Self {
                range: start..at,
                tensors: vec![tensor.clone()],
            }
        })
    }

    /// Some rows of the matrix that lies here, `cols` wide, as they are multiplied in training: rounded with
    /// [`Mat::dithered`], where the precision rounds.
    pub fn rows<'a>(&self, flat: &'a [f32], rows: Range<usize>, cols: usize) -> Mat<'a> {
        let first = self.range.start + rows.start * cols;
        Mat::new(&flat[first..][..rows.len() * cols], rows.len(), cols).dithered(first)
    }
}

/// A linear map `[rows, cols]` (out × in), perhaps of several projections stacked, and its bias `[rows]`.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The weight.
    pub weight: Span,
    /// The bias; projections stacked here have one all or none.
    pub bias: Option<Span>,
    /// Output features of all projections together.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl Matrix {
    /// The weight in the flat buffer, as it is multiplied in training.
    pub fn of<'a>(&self, flat: &'a [f32]) -> Mat<'a> {
        self.weight.rows(flat, 0..self.rows, self.cols)
    }
}

/// The norms that a layer may have on the residual stream; which it has is the family's.
#[derive(Clone, Debug)]
pub struct LayerNorms<T> {
    /// Of what attention reads.
    pub before_attention: Option<T>,
    /// Of what attention gives to the stream.
    pub after_attention: Option<T>,
    /// Of what the MLP reads, and experts and their router where these have none of their own.
    pub before_mlp: Option<T>,
    /// Of what the MLP, or experts, or both, give to the stream.
    pub after_mlp: Option<T>,
    /// Where an MLP is beside experts: of what the router reads,
    pub before_router: Option<T>,
    /// of what experts read,
    pub before_experts: Option<T>,
    /// of what the MLP gives,
    pub after_one: Option<T>,
    /// and of what experts give.
    pub after_experts: Option<T>,
}

impl<T> LayerNorms<T> {
    /// Those that there are.
    pub fn each(&self) -> impl Iterator<Item = &T> {
        let all = [
            &self.before_attention,
            &self.after_attention,
            &self.before_mlp,
            &self.after_mlp,
            &self.before_router,
            &self.before_experts,
            &self.after_one,
            &self.after_experts,
        ];
        all.into_iter().flatten()
    }

    /// The same, to be changed.
    pub fn each_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let all = [
            &mut self.before_attention,
            &mut self.after_attention,
            &mut self.before_mlp,
            &mut self.after_mlp,
            &mut self.before_router,
            &mut self.before_experts,
            &mut self.after_one,
            &mut self.after_experts,
        ];
        all.into_iter().flatten()
    }

    /// The same norms as something else.
    pub fn try_map<U>(&self, make: impl Fn(&T) -> Result<U>) -> Result<LayerNorms<U>> {
        let made = |norm: &Option<T>| norm.as_ref().map(&make).transpose();
        Ok(LayerNorms {
            before_attention: made(&self.before_attention)?,
            after_attention: made(&self.after_attention)?,
            before_mlp: made(&self.before_mlp)?,
            after_mlp: made(&self.after_mlp)?,
            before_router: made(&self.before_router)?,
            before_experts: made(&self.before_experts)?,
            after_one: made(&self.after_one)?,
            after_experts: made(&self.after_experts)?,
        })
    }

    /// The norm of what a router reads.
    pub fn of_router(&self) -> &Option<T> {
        self.own_or_mlps(&self.before_router)
    }

    /// The norm of what experts read.
    pub fn of_experts(&self) -> &Option<T> {
        self.own_or_mlps(&self.before_experts)
    }

    fn own_or_mlps<'a>(&'a self, own: &'a Option<T>) -> &'a Option<T> {
        if own.is_some() { own } else { &self.before_mlp }
    }
}

/// The parameters of a layer.
#[derive(Clone, Debug)]
pub struct LayerParams {
    /// Norms on the residual stream.
    pub norms: LayerNorms<Span>,
    /// As [`crate::weights::Fused`] has it; of what stands in the place of attention as [`delta::Shape`] or
    /// [`gated_conv::Shape`] have it.
    pub qkv: Matrix,
    /// Norm of queries,
    pub q_norm: Option<Span>,
    /// and norm of keys, where the family has them and the layer has keys.
    pub k_norm: Option<Span>,
    /// Of what stands in the place of attention, what it has beside projections.
    pub recurrent: Option<RecurrentParams>,
    /// What stands beside the scores of each query head in the soft-max, `[heads]`.
    pub sinks: Option<Span>,
    /// The output projection of attention, or of that.
    pub output: Matrix,
    /// What says which experts a token goes to, where there are several, and what the one for all tokens counts.
    pub router: Option<Matrix>,
    /// What is added to scores where the best are chosen.
    pub selection: Option<Span>,
    /// What experts' worth to a token is multiplied by, `[experts]`, where they are apart.
    pub factors: Option<Span>,
    /// The MLP, or the experts, that for all tokens last.
    pub mlps: Vec<MlpParams>,
    /// The MLP beside experts.
    pub beside: Option<MlpParams>,
    /// Of what the layer reads of each token beside the residual stream.
    pub input: Option<InputParams>,
    /// What the residual stream is multiplied by after the layer, `[1]`.
    pub scale: Option<Span>,
    /// Low-rank adapters are for the MLP, too.
    adapts_mlp: bool,
}

/// The parameters of what stands in the place of attention, beside its projections.
#[derive(Clone, Debug)]
pub enum RecurrentParams {
    /// Of linear attention.
    Delta(DeltaParams),
    /// Of a gated short convolution.
    Conv(ConvParams),
}

impl RecurrentParams {
    /// All of them.
    pub fn spans(&self) -> Vec<&Span> {
        match self {
            Self::Delta(delta) => delta.spans().to_vec(),
            Self::Conv(conv) => vec![&conv.weight],
        }
    }
}

/// The parameters of a gated short convolution beside its projections.
#[derive(Clone, Debug)]
pub struct ConvParams {
    pub shape: gated_conv::Shape,
    /// `[channels, 1, kernel]`.
    pub weight: Span,
}

/// The parameters of linear attention beside its projections: see [`delta::Weights`].
#[derive(Clone, Debug)]
pub struct DeltaParams {
    pub shape: delta::Shape,
    /// `[qkv_width, 1, kernel]`.
    pub conv: Span,
    pub dt_bias: Span,
    pub a_log: Span,
    pub norm: Span,
}

impl DeltaParams {
    /// All of them.
    pub fn spans(&self) -> [&Span; 4] {
        [&self.conv, &self.dt_bias, &self.a_log, &self.norm]
    }
}

/// The parameters of an MLP.
#[derive(Clone, Debug)]
pub struct MlpParams {
    /// `[gate | up]`.
    pub gate_up: Matrix,
    /// Its output projection.
    pub down: Matrix,
}

/// The parameters by which a layer reads an embedding of its own: see [`super::layer_inputs`].
#[derive(Clone, Debug)]
pub struct InputParams {
    /// From the residual stream to as many gates, `[width, hidden]`.
    pub gate: Matrix,
    /// Back to it, `[hidden, width]`.
    pub projection: Matrix,
    /// The norm of what that gives.
    pub norm: Span,
}

/// The parameters that make these embeddings.
#[derive(Clone, Debug)]
pub struct InputTables {
    /// Of each token those of all layers, `[vocab, layers · width]`.
    pub table: Span,
    /// What each layer's gains of the model's own embedding, `[layers · width, hidden]`.
    pub projection: Matrix,
    /// The norm of that, `[width]`.
    pub norm: Span,
}

impl LayerParams {
    /// The linear maps, in the order of the forward pass.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let mlps = self.mlps.iter().chain(&self.beside);
        let mlps = mlps.flat_map(|mlp| [&mlp.gate_up, &mlp.down]);
        let attention = [&self.qkv, &self.output].into_iter();
        let input = self.input.iter();
        let input = input.flat_map(|input| [&input.gate, &input.projection]);
        attention.chain(&self.router).chain(mlps).chain(input)
    }

    /// Both norms of queries and keys, where it has them.
    pub fn qk_norms(&self) -> Option<(&Span, &Span)> {
        self.q_norm.as_ref().zip(self.k_norm.as_ref())
    }

    /// The MLP of a layer that is no mixture of experts; of one that is, the first expert's.
    pub fn mlp(&self) -> &MlpParams {
        &self.mlps[0]
    }

    /// Those that low-rank adapters are for: all, but in a model with mixtures of experts attention's alone.
    pub fn adapted(&self) -> impl Iterator<Item = &Matrix> {
        self.matrices().take(if self.adapts_mlp { 4 } else { 2 })
    }
}

/// The parameters of a model.
#[derive(Clone, Debug)]
pub struct Params {
    /// `[vocab, hidden]`.
    pub embedding: Span,
    /// In order.
    pub layers: Vec<LayerParams>,
    /// The last norm.
    pub norm: Span,
    /// Of the embeddings that layers have of their own.
    pub inputs: Option<InputTables>,
    /// `[vocab, hidden]`; none where the embedding serves.
    pub head: Option<Span>,
    /// The length of the flat buffer.
    pub len: usize,
}

impl Params {
    /// Lays out the parameters of a model.
    pub fn new(config: &Config) -> Self {
        let mut cursor = Cursor {
            config,
            shapes: config.parameters().into_iter().collect(),
            at: 0,
        };
        let embedding = cursor.span("model.", &["embed_tokens.weight"]);
        let mut layers: Vec<_> = (0..config.layers).map(|i| cursor.layer(i)).collect();
        let norm = cursor.span("model.", &["norm.weight"]);
        let inputs = config.layer_inputs.map(|_| InputTables {
            table: cursor.span("model.", &["embed_tokens_per_layer.weight"]),
            projection: cursor.matrix("model.", &["per_layer_model_projection"], false),
            norm: cursor.span("model.", &["per_layer_projection_norm.weight"]),
        });
        let head = (!config.tied).then(|| cursor.span("", &["lm_head.weight"]));
        // Last, since these are of any number: all else begins where vectors can be read.
        for (i, layer) in layers.iter_mut().enumerate() {
            let selects = config.experts[i].is_some_and(|experts| experts.biased);
            let prefix = format!("model.layers.{i}.");
            layer.selection = selects.then(|| cursor.span(&prefix, &[SELECTION]));
            let scaled = config.layer_scales;
            layer.scale = scaled.then(|| cursor.span(&prefix, &[LAYER_SCALE]));
            let biases = config.experts[i].is_some_and(|experts| experts.biases);
            if let Some(router) = layer.router.as_mut().filter(|_| biases) {
                router.bias = Some(cursor.span(&prefix, &["mlp.gate.bias"]));
            }
            let apart = config.experts[i].is_some_and(|experts| experts.apart);
            layer.factors = apart.then(|| cursor.span(&prefix, &[FACTORS]));
            let sinks = config.sinks && config.recurrences[i].is_none();
            layer.sinks = sinks.then(|| cursor.span(&prefix, &[SINKS]));
        }
        Self {
            embedding,
            layers,
            norm,
            inputs,
            head,
            len: cursor.at,
        }
    }

    /// The LM head, which may be the embedding.
    pub fn head(&self) -> &Span {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Whether a span's gradient is a matrix product: that of the matrices and of the LM head.
    pub fn is_product(&self, span: &Span) -> bool {
        let mut products = self.matrices().map(|m| &m.weight).chain([self.head()]);
        products.any(|product| product.range == span.range)
    }

    /// All linear maps but the LM head.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let inputs = self.inputs.iter().map(|inputs| &inputs.projection);
        let layers = self.layers.iter().flat_map(LayerParams::matrices);
        layers.chain(inputs)
    }

    /// All spans, in the order of the flat buffer.
    pub fn spans(&self) -> Vec<&Span> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            all.extend(layer.norms.each());
            for matrix in layer.matrices() {
                all.push(&matrix.weight);
                all.extend(&matrix.bias);
            }
            all.extend(layer.q_norm.iter().chain(&layer.k_norm));
            all.extend(layer.recurrent.iter().flat_map(RecurrentParams::spans));
            all.extend(layer.input.as_ref().map(|input| &input.norm));
            all.extend(layer.selection.iter().chain(&layer.scale));
            all.extend(layer.factors.iter().chain(&layer.sinks));
        }
        all.push(&self.norm);
        if let Some(inputs) = &self.inputs {
            all.extend([&inputs.table, &inputs.projection.weight, &inputs.norm]);
        }
        all.extend(&self.head);
        all.sort_by_key(|span| span.range.start);
        all
    }

    /// Every tensor with its shape and its place in the flat buffer.
    pub fn tensors(&self) -> Vec<(&str, &[usize], Range<usize>)> {
        let mut all = vec![];
        for span in self.spans() {
            let mut at = span.range.start;
            for (name, shape) in &span.tensors {
                let len: usize = shape.iter().product();
                all.push((name.as_str(), shape.as_slice(), at..at + len));
                at += len;
            }
        }
        all
    }

    /// The place of every tensor in the flat buffer, by its name.
    pub fn places(&self) -> HashMap<&str, Range<usize>> {
        let tensors = self.tensors().into_iter();
        tensors.map(|(name, _, range)| (name, range)).collect()
    }

    /// Reads all weights into one flat buffer.
    pub fn read(&self, weights: &Weights) -> Result<Vec<f32>> {
        let mut flat = vec![0.0; self.len];
        for (name, shape, range) in self.tensors() {
            flat[range].copy_from_slice(&weights.tensor(name, shape)?);
        }
        Ok(flat)
    }
}

/// Something that holds parameters: the flat buffer, or a checkpoint that is read span by span.
pub trait Source {
    /// The values of a span.
    fn get(&self, span: &Span) -> Result<Cow<'_, [f32]>>;

    /// The bytes of a span's tensors, in order, where all are stored as bfloat16: who wants that need not widen them.
    fn bfloat16(&self, _: &Span) -> Result<Option<Vec<&[u8]>>> {
        Ok(None)
    }

    /// Whether the format in which a span's tensors are stored has numbers of bfloat16 alone.
    fn is_bfloat16(&self, _: &Span) -> Result<bool> {
        Ok(false)
    }
}

impl Source for [f32] {
    fn get(&self, span: &Span) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(&self[span.range.clone()]))
    }
}

impl Source for Weights {
    fn get(&self, span: &Span) -> Result<Cow<'_, [f32]>> {
        let mut values = Vec::with_capacity(span.range.len());
        for (name, shape) in &span.tensors {
            values.append(&mut self.tensor(name, shape)?);
        }
        Ok(Cow::Owned(values))
    }

    fn bfloat16(&self, span: &Span) -> Result<Option<Vec<&[u8]>>> {
        let tensors = span.tensors.iter();
        tensors
            .map(|(name, shape)| self.bfloat16_bytes(name, shape))
            .collect()
    }

    fn is_bfloat16(&self, span: &Span) -> Result<bool> {
        for (name, shape) in &span.tensors {
            if !Self::is_bfloat16(self, name, shape)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What is multiplied together in an MLP.
const GATE_UP: [&str; 2] = ["gate_proj", "up_proj"];
const DOWN: [&str; 1] = ["down_proj"];

/// Hands out places in order.
struct Cursor<'a> {
    config: &'a Config,
    shapes: HashMap<String, Vec<usize>>,
    at: usize,
}

impl Cursor<'_> {
    fn layer(&mut self, i: usize) -> LayerParams {
        let c = self.config;
        let prefix = format!("model.layers.{i}.");
        let [before_attention, after_attention, before_mlp, after_mlp] = c.layer_norms();
        let norm = |cursor: &mut Self, name: Option<&str>| {
            name.map(|name| cursor.span(&prefix, &[&format!("{name}.weight")]))
        };
        // In the order of the forward pass: what is used together lies together.
        let before_attention = norm(self, before_attention);
        let qk_norm = c.qk_norm.filter(|_| c.recurrences[i].is_none());
        let (qkv, recurrent, output, o_bias) = match c.recurrences[i] {
            None => {
                let projections = c.attention_projections(i);
                let (_, read) = projections.split_last().expect("the output's is the last");
                let read: Vec<_> = read.iter().map(|projection| projection.0).collect();
                let qkv = self.matrix(&prefix, &read, c.qkv_bias);
                (qkv, None, "self_attn.o_proj", c.o_bias)
            }
            Some(Recurrence::Delta(shape)) => {
                let parts =
                    ["qkv", "z", "b", "a"].map(|part| format!("linear_attn.in_proj_{part}"));
                let qkv = self.matrix(&prefix, &parts.each_ref().map(String::as_str), false);
                let delta = RecurrentParams::Delta(self.delta(shape, &prefix));
                (qkv, Some(delta), "linear_attn.out_proj", false)
            }
            Some(Recurrence::Conv(shape)) => {
                let qkv = self.matrix(&prefix, &["conv.in_proj"], false);
                let weight = self.span(&prefix, &["conv.conv.weight"]);
                let conv = RecurrentParams::Conv(ConvParams { shape, weight });
                (qkv, Some(conv), "conv.out_proj", false)
            }
        };
        let has_keys = c.fused(i) != Fused::Queries;
        let q_norm = norm(self, qk_norm.map(|_| "self_attn.q_norm"));
        let k_norm = norm(
            self,
            qk_norm.filter(|_| has_keys).map(|_| "self_attn.k_norm"),
        );
        let output = self.matrix(&prefix, &[output], o_bias);
        let after_attention = norm(self, after_attention);
        let before_mlp = norm(self, before_mlp);
        let experts = c.experts[i];
        let apart = experts.filter(|experts| experts.apart);
        let apart_norms = apart.map(|_| APART_NORMS.map(|name| self.span(&prefix, &[name])));
        let [before_router, before_experts, after_one, after_experts] =
            apart_norms.map_or([const { None }; 4], |norms| norms.map(Some));
        let router = experts.map(|experts| {
            let gate = ["mlp.gate", "mlp.shared_expert_gate"];
            let gated = experts.outputs() > experts.count;
            self.matrix(&prefix, &gate[..1 + usize::from(gated)], false)
        });
        let mlps = match experts {
            None => vec![self.mlp(&format!("{prefix}mlp."), c.mlp_bias)],
            Some(experts) => self.experts(experts, &prefix),
        };
        let beside = apart.map(|_| self.mlp(&format!("{prefix}mlp."), c.mlp_bias));
        let after_mlp = norm(self, after_mlp);
        let input = c.layer_inputs.map(|_| InputParams {
            gate: self.matrix(&prefix, &["per_layer_input_gate"], false),
            projection: self.matrix(&prefix, &["per_layer_projection"], false),
            norm: self.span(&prefix, &["post_per_layer_input_norm.weight"]),
        });
        LayerParams {
            norms: LayerNorms {
                before_attention,
                after_attention,
                before_mlp,
                after_mlp,
                before_router,
                before_experts,
                after_one,
                after_experts,
            },
            qkv,
            q_norm,
            k_norm,
            recurrent,
            sinks: None,
            output,
            router,
            selection: None,
            factors: None,
            mlps,
            beside,
            input,
            scale: None,
            adapts_mlp: c.mixture().is_none(),
        }
    }

    fn delta(&mut self, shape: delta::Shape, prefix: &str) -> DeltaParams {
        let mut span = |name: &str| self.span(prefix, &[format!("linear_attn.{name}")]);
        DeltaParams {
            shape,
            conv: span("conv1d.weight"),
            dt_bias: span("dt_bias"),
            a_log: span("A_log"),
            norm: span("norm.weight"),
        }
    }

    fn mlp(&mut self, prefix: &str, bias: bool) -> MlpParams {
        MlpParams {
            gate_up: self.matrix(prefix, &GATE_UP, bias),
            down: self.matrix(prefix, &DOWN, bias),
        }
    }

    /// The experts of a layer, that for all tokens last. Weights of those that are chosen among follow each other, and then biases
    /// of one kind and of the other.
    fn experts(&mut self, experts: Experts, prefix: &str) -> Vec<MlpParams> {
        let of = |expert| format!("{prefix}mlp.experts.{expert}.");
        let each = 0..experts.count;
        let mut mlps: Vec<_> = each.map(|expert| self.mlp(&of(expert), false)).collect();
        if experts.biases {
            for (expert, mlp) in mlps.iter_mut().enumerate() {
                mlp.gate_up.bias = Some(self.named(&of(expert), &GATE_UP, "bias"));
            }
            for (expert, mlp) in mlps.iter_mut().enumerate() {
                mlp.down.bias = Some(self.named(&of(expert), &DOWN, "bias"));
            }
        }
        let shared = format!("{prefix}mlp.shared_expert.");
        mlps.extend(experts.shared.map(|_| self.mlp(&shared, false)));
        mlps
    }

    fn matrix(&mut self, prefix: &str, modules: &[&str], bias: bool) -> Matrix {
        let weight = self.named(prefix, modules, "weight");
        let bias = bias.then(|| self.named(prefix, modules, "bias"));
        let rows = weight.tensors.iter().map(|(_, shape)| shape[0]).sum();
        let cols = weight.tensors[0].1[1];
        Matrix {
            weight,
            bias,
            rows,
            cols,
        }
    }

    fn named(&mut self, prefix: &str, modules: &[&str], kind: &str) -> Span {
        let names: Vec<_> = modules.iter().map(|m| format!("{m}.{kind}")).collect();
        self.span(prefix, &names)
    }

    fn span<S: AsRef<str>>(&mut self, prefix: &str, names: &[S]) -> Span {
        let tensor = |name: String| {
            let shape = self.shapes[&name].clone();
            (name, shape)
        };
        let tensors: Vec<_> = names
            .iter()
            .map(|name| tensor(format!("{prefix}{}", name.as_ref())))
            .collect();
        let len: usize = tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        self.at += len;
        Span {
            range: self.at - len..self.at,
            tensors,
        }
    }
}
