//! The model families that one decoder serves: what their configs mean and leave unsaid.

use super::config::{Norms, QkNorm, SELECTION, Scores};
use crate::kernels::activation::Activation;

/// What is true of every model of a family.
pub(super) struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// What the names of its classes in transformers begin with.
    pub class: &'static str,
    /// `general.architecture` of a GGUF.
    pub gguf: &'static str,
    /// transformers' values of fields that a config leaves out: `num_key_value_heads` (None: as many as query heads),
    pub kv_heads: Option<usize>,
    /// `head_dim` (None: hidden_size / num_attention_heads),
    pub head_dim: Option<usize>,
    /// `tie_word_embeddings`,
    pub tied: bool,
    /// the norms' epsilon, and the field of that,
    pub norm_eps: f64,
    pub norm_eps_field: &'static str,
    /// `rope_theta`.
    pub theta: f64,
    /// The fields that say whether there are biases: on queries, keys and values; on the output projection; in the MLP.
    pub biases: [Option<&'static str>; 3],
    /// Queries, keys and values have biases where the config says nothing that is heard.
    pub qkv_bias: bool,
    pub norms: Norms,
    /// See [`super::config::Config::norms_centred`].
    pub norms_centred: bool,
    /// Norms multiply by 1 + the weight in a Hugging Face folder (by the weight in a GGUF).
    pub norms_from_one: bool,
    pub qk_norm: Option<QkNorm>,
    /// The field that says whether queries and keys are normed, where it is asked: unsaid they are not.
    pub qk_norm_asked: Option<&'static str>,
    pub activation: Activation,
    /// The fields that name it, and its names there.
    pub activation_names: &'static [ActivationNames],
    pub scales: Scales,
    /// `attn_logit_softcapping` and `final_logit_softcapping`, where they are heard: what they are where a file has none.
    pub caps: [Option<Option<f64>>; 2],
    /// The layers of that model of [`Scales::Roots`] whose GGUF does not say that its scores are divided by the root of
    /// hidden / heads, not by that of its heads' width: llama.cpp knows it.
    pub gguf_apart: Option<usize>,
    /// Ends of a YaRN's ramp are rounded to pairs where a GGUF has one: it says nothing of that.
    pub gguf_truncates: bool,
    pub windows: Windows,
    /// What a GGUF calls the norm before the MLP,
    pub gguf_mlp_norm: &'static str,
    /// and the last one.
    pub gguf_last_norm: &'static str,
    /// A GGUF has the rows of query and key heads in an order for rotating neighbours.
    pub permuted: bool,
    /// `llama_4_scaling_beta` is heard.
    pub query_growth: bool,
    /// `partial_rotary_factor` is heard,
    pub partial: bool,
    /// and is this where a file has none.
    pub rotated_part: f64,
    /// Files have the rows of heads that are turned together as neighbours, not half a head apart.
    pub neighbours: bool,
    /// A "dynamic" scaling with an `alpha` is a larger base.
    pub alpha: bool,
    /// Attention is gated.
    pub attention_gate: bool,
    /// See [`super::config::Config::sinks`].
    pub sinks: bool,
    /// What layers may have in the place of attention.
    pub recurrence: Option<RecurrenceKind>,
    /// `block_auto_adjust_ff_dim` is heard, and true where a file has none.
    pub ffn_adjusted: bool,
    /// Layers may differ as Gemma 4's do. If so, they may have embeddings of their own, as wide as this where a file has
    /// nothing.
    pub uneven: Option<Option<usize>>,
    /// What transformers has where a file lacks a field, beyond the above: that, and its value in JSON.
    pub unsaid: &'static [(&'static str, &'static str)],
    /// The name is one for hybrids too, of which those with attention and an MLP in every layer are read.
    pub hybrid: bool,
    /// Layers' MLPs are mixtures of experts.
    pub mixture: Option<Mixture>,
    /// Projections that are one matrix in files.
    pub fused: &'static [Fused],
    pub renamed: &'static [Renamed],
    /// Fields of a config that have another name, too, which counts before the usual one: that, and the usual.
    pub spelled: &'static [(&'static str, &'static str)],
}

impl Family {
    /// The class in transformers, as `architectures` names it.
    pub fn architecture(&self) -> String {
        format!("{}ForCausalLM", self.class)
    }

    /// What embeddings are multiplied by, whatever a file says.
    pub fn embed_scale(&self, hidden: usize) -> f32 {
        match self.scales {
            Scales::Embeddings | Scales::Roots | Scales::Unscaled => (hidden as f64).sqrt() as f32,
            Scales::Plain | Scales::Logits | Scales::Multipliers => 1.0,
        }
    }
}

/// How files speak of experts.
pub(super) struct Mixture {
    /// The field that says whether there are any, where it is asked: unsaid there are none.
    pub asked: Option<&'static str>,
    /// The fields of their number: as it is written, and what it is called, too,
    pub count: [&'static str; 2],
    /// those of how many a token goes to,
    pub used: [&'static str; 2],
    /// and that of their inner width.
    pub width: &'static str,
    /// Which layers have them; the others have one MLP, which is as wide as `intermediate_size`.
    pub layers: SparseLayers,
    pub scores: Scores,
    pub normed: Normed,
    /// The field of the least number that scores are divided by (a family without one has it as it is), and what it is unsaid.
    pub least: (Option<&'static str>, f64),
    /// What is added to the sum that they are divided by.
    pub plus: f32,
    /// The field of what they are multiplied by, where it is heard.
    pub scale: Option<&'static str>,
    /// What a folder calls the numbers that only choose, if there are some, and the dimensions before that of experts.
    pub selection: Option<(&'static str, &'static [usize])>,
    pub shared: Option<SharedExpert>,
    /// See [`super::config::Experts::apart`]; the router's logits are divided by √hidden then.
    pub apart: bool,
    /// See [`super::config::Experts::biases`].
    pub biases: bool,
    pub files: ExpertFiles,
}

impl Mixture {
    /// What the router's logits are multiplied by.
    pub fn logit_scale(&self, hidden: usize) -> f32 {
        match self.apart {
            true => (hidden as f64).powf(-0.5) as f32,
            false => 1.0,
        }
    }
}

/// Which layers have experts.
pub(super) enum SparseLayers {
    All,
    /// Every `decoder_sparse_step`-th, but for those in `mlp_only_layers`.
    Steps,
    /// Every `moe_layer_interval`-th from `moe_layer_start_index` to `moe_layer_end_index`.
    Span,
    /// Those from the one on that a field says, which is this where a file has none.
    From(&'static str, i64),
}

/// Whether the scores of those that a token goes to are divided by their sum.
pub(super) enum Normed {
    Always,
    /// `norm_topk_prob` says so. A GGUF may, too; or else it is as in `gguf`.
    Asked {
        unsaid: bool,
        gguf: bool,
    },
}

/// An expert that all tokens go to.
pub(super) struct SharedExpert {
    /// The field of its inner width, or of how many experts' width it has: then this where the file has none.
    pub width: (&'static str, Option<usize>),
    /// Whether there must be one: else its width may be 0, which is what it is unsaid, and there is none.
    pub always: bool,
    pub gated: bool,
}

/// How a Hugging Face folder has the experts of a layer.
pub(super) enum ExpertFiles {
    /// Each by itself: under which name, and what gate, up and down are called.
    Each(&'static str, [&'static str; 3]),
    /// All of them in one tensor of gates and ups and one of downs, `[experts, rows, columns]`, of these names.
    Together([&'static str; 2]),
    /// So, too, but each expert's matrix is turned, and gates and ups are columns by turns (gpt-oss).
    Interleaved,
}

/// What numbers on their way are multiplied by.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scales {
    /// Scores by 1/√head_dim.
    Plain,
    /// So are they, and logits by `logit_scale`, a sixteenth where a file has none (Cohere).
    Logits,
    /// Scores by 1/√head_dim, embeddings by √hidden (the first Gemma).
    Embeddings,
    /// Embeddings by √hidden, and `query_pre_attn_scalar` says what scores are divided by the root of (Gemma 2 and 3).
    Roots,
    /// Embeddings by √hidden, scores by nothing (Gemma 4).
    Unscaled,
    /// Embeddings, scores, what a layer adds and logits, each by a number of the file (Granite).
    Multipliers,
}

/// What a layer may have in the place of attention: see [`super::config::Recurrence`].
#[derive(Clone, Copy, PartialEq)]
pub(super) enum RecurrenceKind {
    Delta,
    Conv,
}

/// Which layers have a window.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Windows {
    /// None.
    None,
    /// All, if there is a `sliding_window`.
    All,
    /// All, if there is a `sliding_window`, which is 4096 where the file has none; or those that `layer_types` names.
    Typed,
    /// With `use_sliding_window`, those from `max_window_layers` on, or those that `layer_types` names.
    Last,
    /// With `use_sliding_window`, those that do not rotate, or those that `layer_types` names; `no_rope_layers` says which
    /// rotate: else all but every fourth.
    Unrotated,
    /// All but every so-manieth, or those that `layer_types` names; and so they are rotated.
    AllBut(usize, Rotated),
}

/// How layers with a window are rotated.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Rotated {
    /// As the others are.
    Alike,
    /// By the others' base, unscaled.
    Unscaled,
    /// By a base of their own, which is this where the file has none, unscaled.
    By(f64),
    /// As the others would be, which are not rotated at all, unless no layer can have a window.
    Alone,
    /// The same, but that there must be a window.
    Only,
}

const LLAMA: Family = Family {
    model_type: "llama",
    class: "Llama",
    gguf: "llama",
    kv_heads: None,
    head_dim: None,
    tied: false,
    norm_eps: 1e-6,
    norm_eps_field: "rms_norm_eps",
    theta: 10_000.0,
    biases: [
        Some("attention_bias"),
        Some("attention_bias"),
        Some("mlp_bias"),
    ],
    qkv_bias: false,
    norms: Norms::Before,
    norms_centred: false,
    norms_from_one: false,
    qk_norm: None,
    qk_norm_asked: None,
    activation: Activation::Silu,
    activation_names: &[("hidden_act", &["silu", "swish"])],
    scales: Scales::Plain,
    caps: [None; 2],
    gguf_apart: None,
    gguf_truncates: true,
    windows: Windows::None,
    gguf_mlp_norm: "ffn_norm",
    gguf_last_norm: "output_norm",
    permuted: true,
    query_growth: false,
    partial: false,
    rotated_part: 1.0,
    neighbours: false,
    alpha: false,
    attention_gate: false,
    sinks: false,
    recurrence: None,
    ffn_adjusted: false,
    uneven: None,
    unsaid: &[],
    hybrid: false,
    mixture: None,
    fused: &[],
    renamed: &[],
    spelled: &[],
};

/// Of families that do not hear `mlp_bias`.
const NO_MLP_BIAS: [Option<&str>; 3] = [Some("attention_bias"), Some("attention_bias"), None];

/// A field that names an activation, and its names there.
pub(super) type ActivationNames = (&'static str, &'static [&'static str]);

const GELU_TANH: ActivationNames = ("hidden_activation", &["gelu_pytorch_tanh"]);

/// As most of them have it.
const MIXTURE: Mixture = Mixture {
    asked: None,
    count: ["num_experts", "num_local_experts"],
    used: ["num_experts_per_tok"; 2],
    width: "intermediate_size",
    layers: SparseLayers::All,
    scores: Scores::Softmax,
    normed: Normed::Always,
    least: (None, 0.0),
    plus: 0.0,
    scale: None,
    selection: None,
    shared: None,
    apart: false,
    biases: false,
    files: ExpertFiles::Each("mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
};

/// Qwen's.
const QWEN_MIXTURE: Mixture = Mixture {
    width: "moe_intermediate_size",
    layers: SparseLayers::Steps,
    ..MIXTURE
};

const QWEN_SHARED: Option<SharedExpert> = Some(SharedExpert {
    width: ("shared_expert_intermediate_size", None),
    always: true,
    gated: true,
});

/// Granite's.
const GRANITE_MIXTURE: Mixture = Mixture {
    count: ["num_local_experts", "num_experts"],
    files: ExpertFiles::Together([
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
    ]),
    ..MIXTURE
};

/// A matrix of a file, and the projections that are its rows in turn.
pub(super) type Fused = (&'static str, &'static [&'static str]);

/// A module that has another name in a Hugging Face folder: the decoder's, and that.
pub(super) type Renamed = (&'static str, &'static str);

const SHARED_EXPERTS: Renamed = ("mlp.shared_expert", "mlp.shared_experts");

/// Queries, keys and values as one.
pub(super) const QKV: Fused = (
    "self_attn.qkv_proj",
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
);

/// Gates and ups as one.
const GATE_UP: Fused = ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]);

const GRANITE: Family = Family {
    model_type: "granite",
    class: "Granite",
    gguf: "granite",
    scales: Scales::Multipliers,
    ..LLAMA
};

const GRANITE_ROUTER: Renamed = ("mlp.gate", "block_sparse_moe.router.layer");

const GRANITE_MOE: Family = Family {
    model_type: "granitemoe",
    class: "GraniteMoe",
    gguf: "granitemoe",
    biases: NO_MLP_BIAS,
    mixture: Some(GRANITE_MIXTURE),
    renamed: &[GRANITE_ROUTER],
    ..GRANITE
};

const OLMO2: Family = Family {
    model_type: "olmo2",
    class: "Olmo2",
    gguf: "olmo2",
    norm_eps: 1e-5,
    biases: NO_MLP_BIAS,
    norms: Norms::After,
    qk_norm: Some(QkNorm::Rows),
    permuted: false,
    ..LLAMA
};

const GEMMA: Family = Family {
    model_type: "gemma",
    class: "Gemma",
    gguf: "gemma",
    kv_heads: Some(16),
    head_dim: Some(256),
    tied: true,
    biases: NO_MLP_BIAS,
    norms_from_one: true,
    activation: Activation::GeluTanh,
    // The first ones were published with a wrong name, which transformers takes for the right one.
    activation_names: &[GELU_TANH, ("hidden_act", &["gelu_pytorch_tanh", "gelu"])],
    scales: Scales::Embeddings,
    permuted: false,
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    class: "Gemma2",
    gguf: "gemma2",
    kv_heads: Some(4),
    norms: Norms::Around,
    scales: Scales::Roots,
    activation_names: &[GELU_TANH],
    caps: [Some(Some(50.0)), Some(Some(30.0))],
    gguf_apart: Some(46),
    windows: Windows::AllBut(2, Rotated::Alike),
    ..GEMMA
};

const GEMMA4: Family = Family {
    model_type: "gemma4_text",
    class: "Gemma4",
    gguf: "gemma4",
    biases: NO_MLP_BIAS,
    norms_from_one: false,
    qk_norm: Some(QkNorm::Heads),
    scales: Scales::Unscaled,
    caps: [None, Some(None)],
    gguf_apart: None,
    windows: Windows::AllBut(6, Rotated::By(10_000.0)),
    uneven: Some(Some(256)),
    mixture: Some(Mixture {
        asked: Some("enable_moe_block"),
        count: ["num_experts"; 2],
        used: ["top_k_experts"; 2],
        width: "moe_intermediate_size",
        apart: true,
        files: ExpertFiles::Together(["experts.gate_up_proj", "experts.down_proj"]),
        ..MIXTURE
    }),
    renamed: &[("mlp.gate", "router.proj")],
    unsaid: &[("sliding_window", "512"), GEMMA4_ROPES],
    ..GEMMA2
};

const GEMMA4_ROPES: (&str, &str) = (
    "rope_parameters",
    r#"{"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}}"#,
);

const COHERE: Family = Family {
    model_type: "cohere",
    class: "Cohere",
    gguf: "command-r",
    tied: true,
    norm_eps: 1e-5,
    norm_eps_field: "layer_norm_eps",
    theta: 500_000.0,
    biases: NO_MLP_BIAS,
    norms: Norms::Once,
    norms_centred: true,
    qk_norm: Some(QkNorm::Apart),
    qk_norm_asked: Some("use_qk_norm"),
    scales: Scales::Logits,
    permuted: false,
    neighbours: true,
    ..LLAMA
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    class: "Mistral",
    kv_heads: Some(8),
    biases: [None; 3],
    windows: Windows::Typed,
    ..LLAMA
};

const GLM4: Family = Family {
    model_type: "glm4",
    class: "Glm4",
    gguf: "glm4",
    kv_heads: Some(2),
    head_dim: Some(128),
    norm_eps: 1.5625e-7,
    qkv_bias: true,
    biases: [Some("attention_bias"), None, None],
    norms: Norms::Around,
    permuted: false,
    partial: true,
    rotated_part: 0.5,
    neighbours: true,
    fused: &[GATE_UP],
    renamed: &[
        ("post_attention_layernorm", "post_self_attn_layernorm"),
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
        ("post_feedforward_layernorm", "post_mlp_layernorm"),
    ],
    ..LLAMA
};

const QWEN3_5: Family = Family {
    model_type: "qwen3_5_text",
    class: "Qwen3_5",
    gguf: "qwen35",
    kv_heads: Some(4),
    head_dim: Some(256),
    biases: NO_MLP_BIAS,
    norms_from_one: true,
    qk_norm: Some(QkNorm::Heads),
    permuted: false,
    partial: true,
    rotated_part: 0.25,
    gguf_mlp_norm: "post_attention_norm",
    attention_gate: true,
    recurrence: Some(RecurrenceKind::Delta),
    ..LLAMA
};

const ERNIE: Family = Family {
    model_type: "ernie4_5",
    class: "Ernie4_5",
    gguf: "ernie4_5",
    kv_heads: Some(2),
    head_dim: Some(128),
    tied: true,
    norm_eps: 1e-5,
    theta: 500_000.0,
    biases: [Some("use_bias"); 3],
    permuted: false,
    neighbours: true,
    ..LLAMA
};

const HUNYUAN: Family = Family {
    model_type: "hunyuan_v1_dense",
    class: "HunYuanDenseV1",
    gguf: "hunyuan-dense",
    norm_eps: 1e-5,
    biases: NO_MLP_BIAS,
    qk_norm: Some(QkNorm::Turned),
    permuted: false,
    alpha: true,
    renamed: &HUNYUAN_NORMS,
    ..LLAMA
};

const HUNYUAN_NORMS: [Renamed; 2] = [
    ("self_attn.q_norm", "self_attn.query_layernorm"),
    ("self_attn.k_norm", "self_attn.key_layernorm"),
];

const LFM2_NAMES: [Renamed; 10] = [
    ("mlp.gate", "feed_forward.gate"),
    ("self_attn.q_norm", "self_attn.q_layernorm"),
    ("self_attn.k_norm", "self_attn.k_layernorm"),
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("input_layernorm", "operator_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("norm", "embedding_norm"),
];

const LFM2: Family = Family {
    model_type: "lfm2",
    class: "Lfm2",
    gguf: "lfm2",
    kv_heads: Some(8),
    tied: true,
    norm_eps: 1e-5,
    norm_eps_field: "norm_eps",
    theta: 1_000_000.0,
    biases: [None; 3],
    qk_norm: Some(QkNorm::Heads),
    gguf_last_norm: "token_embd_norm",
    permuted: false,
    recurrence: Some(RecurrenceKind::Conv),
    ffn_adjusted: true,
    renamed: &LFM2_NAMES,
    spelled: &[
        ("block_ff_dim", "intermediate_size"),
        ("tie_embedding", "tie_word_embeddings"),
    ],
    ..LLAMA
};

const GPT_OSS: Family = Family {
    model_type: "gpt_oss",
    class: "GptOss",
    gguf: "gpt-oss",
    kv_heads: Some(8),
    head_dim: Some(64),
    norm_eps: 1e-5,
    theta: 150_000.0,
    biases: [Some("attention_bias"), Some("attention_bias"), None],
    activation: Activation::Clamped {
        alpha: 1.702,
        limit: 7.0,
    },
    gguf_truncates: false,
    windows: Windows::AllBut(2, Rotated::Alike),
    gguf_mlp_norm: "post_attention_norm",
    permuted: false,
    sinks: true,
    mixture: Some(Mixture {
        count: ["num_local_experts", "num_experts"],
        biases: true,
        files: ExpertFiles::Interleaved,
        ..MIXTURE
    }),
    renamed: &[("mlp.gate", "mlp.router")],
    unsaid: &[
        ("attention_bias", "true"),
        ("sliding_window", "128"),
        (
            "rope_parameters",
            r#"{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096}"#,
        ),
    ],
    ..LLAMA
};

static FAMILIES: [Family; 39] = [
    LLAMA,
    MISTRAL,
    Family {
        model_type: "qwen2",
        class: "Qwen2",
        gguf: "qwen2",
        qkv_bias: true,
        biases: [None; 3],
        windows: Windows::Last,
        permuted: false,
        ..LLAMA
    },
    Family {
        model_type: "qwen3",
        class: "Qwen3",
        gguf: "qwen3",
        head_dim: Some(128),
        biases: NO_MLP_BIAS,
        qk_norm: Some(QkNorm::Heads),
        windows: Windows::Last,
        permuted: false,
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        class: "SmolLM3",
        gguf: "smollm3",
        kv_heads: Some(4),
        tied: true,
        theta: 2_000_000.0,
        windows: Windows::Unrotated,
        ..LLAMA
    },
    OLMO2,
    Family {
        model_type: "olmo3",
        class: "Olmo3",
        theta: 500_000.0,
        windows: Windows::AllBut(4, Rotated::Unscaled),
        ..OLMO2
    },
    GEMMA,
    GEMMA2,
    Family {
        model_type: "gemma3_text",
        class: "Gemma3",
        gguf: "gemma3",
        theta: 1_000_000.0,
        qk_norm: Some(QkNorm::Heads),
        // transformers reads the other, and does nothing with it.
        caps: [None, Some(None)],
        gguf_apart: Some(62),
        windows: Windows::AllBut(6, Rotated::By(10_000.0)),
        ..GEMMA2
    },
    Family {
        model_type: "phi3",
        class: "Phi3",
        gguf: "phi3",
        norm_eps: 1e-5,
        biases: [None; 3],
        windows: Windows::All,
        permuted: false,
        partial: true,
        fused: &[QKV, GATE_UP],
        ..LLAMA
    },
    GRANITE,
    Family {
        model_type: "granitemoehybrid",
        class: "GraniteMoeHybrid",
        biases: NO_MLP_BIAS,
        hybrid: true,
        fused: &[("shared_mlp.input_linear", &["mlp.gate_proj", "mlp.up_proj"])],
        renamed: &[("mlp.down_proj", "shared_mlp.output_linear")],
        ..GRANITE
    },
    Family {
        model_type: "olmoe",
        class: "Olmoe",
        gguf: "olmoe",
        norm_eps: 1e-5,
        biases: NO_MLP_BIAS,
        qk_norm: Some(QkNorm::Rows),
        permuted: false,
        mixture: Some(Mixture {
            normed: Normed::Asked {
                unsaid: false,
                gguf: false,
            },
            ..MIXTURE
        }),
        ..LLAMA
    },
    Family {
        model_type: "qwen3_moe",
        class: "Qwen3Moe",
        gguf: "qwen3moe",
        kv_heads: Some(4),
        biases: NO_MLP_BIAS,
        qk_norm: Some(QkNorm::Heads),
        permuted: false,
        mixture: Some(Mixture {
            normed: Normed::Asked {
                unsaid: false,
                gguf: true,
            },
            ..QWEN_MIXTURE
        }),
        ..LLAMA
    },
    Family {
        model_type: "qwen2_moe",
        class: "Qwen2Moe",
        gguf: "qwen2moe",
        kv_heads: Some(16),
        qkv_bias: true,
        biases: [Some("qkv_bias"), None, None],
        windows: Windows::Last,
        permuted: false,
        mixture: Some(Mixture {
            normed: Normed::Asked {
                unsaid: false,
                gguf: false,
            },
            shared: QWEN_SHARED,
            ..QWEN_MIXTURE
        }),
        ..LLAMA
    },
    Family {
        model_type: "mixtral",
        class: "Mixtral",
        kv_heads: Some(8),
        norm_eps: 1e-5,
        theta: 1_000_000.0,
        biases: [None; 3],
        windows: Windows::All,
        mixture: Some(Mixture {
            count: ["num_local_experts", "num_experts"],
            files: ExpertFiles::Each("block_sparse_moe.experts", ["w1", "w3", "w2"]),
            ..MIXTURE
        }),
        renamed: &[("mlp.gate", "block_sparse_moe.gate")],
        ..LLAMA
    },
    GRANITE_MOE,
    Family {
        model_type: "granitemoeshared",
        class: "GraniteMoeShared",
        mixture: Some(Mixture {
            shared: Some(SharedExpert {
                width: ("shared_intermediate_size", None),
                always: false,
                gated: false,
            }),
            ..GRANITE_MIXTURE
        }),
        fused: &[(
            "shared_mlp.input_linear",
            &["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
        )],
        renamed: &[
            GRANITE_ROUTER,
            ("mlp.shared_expert.down_proj", "shared_mlp.output_linear"),
        ],
        ..GRANITE_MOE
    },
    // What transformers makes of a Mistral with `layer_types`.
    Family {
        model_type: "ministral",
        class: "Ministral",
        ..MISTRAL
    },
    QWEN3_5,
    Family {
        model_type: "qwen3_5_moe_text",
        class: "Qwen3_5Moe",
        gguf: "qwen35moe",
        kv_heads: Some(2),
        mixture: Some(Mixture {
            layers: SparseLayers::All,
            shared: QWEN_SHARED,
            ..QWEN_MIXTURE
        }),
        ..QWEN3_5
    },
    GLM4,
    Family {
        model_type: "glm",
        class: "Glm",
        gguf: "chatglm",
        norms: Norms::Before,
        renamed: &[],
        ..GLM4
    },
    Family {
        model_type: "glm4_moe",
        class: "Glm4Moe",
        gguf: "glm4moe",
        kv_heads: Some(8),
        norm_eps: 1e-5,
        biases: [Some("attention_bias"), None, None],
        qk_norm: Some(QkNorm::Heads),
        qk_norm_asked: Some("use_qk_norm"),
        gguf_mlp_norm: "post_attention_norm",
        permuted: false,
        partial: true,
        rotated_part: 0.5,
        mixture: Some(Mixture {
            count: ["n_routed_experts", "num_local_experts"],
            width: "moe_intermediate_size",
            layers: SparseLayers::From("first_k_dense_replace", 1),
            scores: Scores::Sigmoid,
            normed: Normed::Asked {
                unsaid: true,
                gguf: false,
            },
            least: (None, 1e-20),
            scale: Some("routed_scaling_factor"),
            selection: Some((SELECTION, &[])),
            shared: Some(SharedExpert {
                width: ("n_shared_experts", Some(1)),
                always: true,
                gated: false,
            }),
            ..MIXTURE
        }),
        renamed: &[SHARED_EXPERTS],
        ..LLAMA
    },
    ERNIE,
    Family {
        model_type: "ernie4_5_moe",
        class: "Ernie4_5_Moe",
        gguf: "ernie4_5-moe",
        kv_heads: Some(4),
        head_dim: None,
        biases: [None; 3], // the LM head would have one, too
        mixture: Some(Mixture {
            count: ["moe_num_experts", "num_experts"],
            used: ["moe_k", "num_experts_per_tok"],
            width: "moe_intermediate_size",
            layers: SparseLayers::Span,
            least: (Some("moe_norm_min"), 1e-12),
            selection: Some(("mlp.moe_statics.e_score_correction_bias", &[1])),
            shared: Some(SharedExpert {
                width: ("moe_num_shared_experts", Some(2)),
                always: false,
                gated: false,
            }),
            ..MIXTURE
        }),
        renamed: &[SHARED_EXPERTS],
        ..ERNIE
    },
    HUNYUAN,
    Family {
        model_type: "hunyuan_v1_moe",
        class: "HunYuanMoEV1",
        gguf: "hunyuan-moe",
        mixture: Some(Mixture {
            used: ["moe_topk", "num_experts_per_tok"],
            shared: Some(SharedExpert {
                width: ("intermediate_size", None),
                always: true,
                gated: false,
            }),
            ..MIXTURE
        }),
        renamed: &[
            HUNYUAN_NORMS[0],
            HUNYUAN_NORMS[1],
            ("mlp.gate", "mlp.gate.wg"),
            ("mlp.shared_expert", "mlp.shared_mlp"),
        ],
        ..HUNYUAN
    },
    Family {
        model_type: "exaone4",
        class: "Exaone4",
        gguf: "exaone4",
        kv_heads: Some(32),
        biases: [None; 3],
        qk_norm: Some(QkNorm::Heads),
        windows: Windows::AllBut(4, Rotated::Alone),
        ..OLMO2
    },
    Family {
        model_type: "seed_oss",
        class: "SeedOss",
        gguf: "seed_oss",
        kv_heads: Some(8),
        head_dim: Some(128),
        biases: [
            Some("attention_bias"),
            Some("attention_out_bias"),
            Some("mlp_bias"),
        ],
        qkv_bias: true,
        gguf_mlp_norm: "post_attention_norm",
        permuted: false,
        ..LLAMA
    },
    Family {
        model_type: "ministral3",
        class: "Ministral3",
        gguf: "mistral3",
        head_dim: Some(128),
        norm_eps: 1e-5,
        windows: Windows::All,
        query_growth: true,
        ..MISTRAL
    },
    LFM2,
    Family {
        model_type: "lfm2_moe",
        class: "Lfm2Moe",
        gguf: "lfm2moe",
        ffn_adjusted: false,
        mixture: Some(Mixture {
            width: "moe_intermediate_size",
            layers: SparseLayers::From("num_dense_layers", 2),
            scores: Scores::Sigmoid,
            normed: Normed::Asked {
                unsaid: true,
                gguf: true,
            },
            plus: 1e-6,
            scale: Some("routed_scaling_factor"),
            selection: Some(("feed_forward.expert_bias", &[])),
            files: ExpertFiles::Each("feed_forward.experts", ["w1", "w3", "w2"]),
            ..MIXTURE
        }),
        spelled: &[("tie_embedding", "tie_word_embeddings")],
        ..LFM2
    },
    GEMMA4,
    // The 12B, which reads sounds and images without a tower.
    Family {
        model_type: "gemma4_unified_text",
        class: "Gemma4Unified",
        uneven: Some(None),
        mixture: None,
        unsaid: &[("sliding_window", "1024"), GEMMA4_ROPES],
        ..GEMMA4
    },
    GPT_OSS,
    COHERE,
    Family {
        model_type: "cohere2",
        class: "Cohere2",
        gguf: "cohere2",
        theta: 10_000.0,
        qk_norm: None,
        qk_norm_asked: None,
        windows: Windows::AllBut(4, Rotated::Only),
        ..COHERE
    },
];

/// The family of a `model_type`.
pub(super) fn of(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.model_type == model_type)
}

/// The names of all families.
pub fn families() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|f| f.model_type)
}

/// The family of a GGUF's `general.architecture`. With a window, experts, or one that all tokens go to, some are other families,
/// which have no name there.
pub(super) fn of_gguf(
    architecture: &str,
    window: bool,
    experts: bool,
    shared: bool,
) -> Option<&'static Family> {
    let mixes = |f: &&Family| match &f.mixture {
        Some(mixture) => experts || mixture.asked.is_some(),
        None => !experts,
    };
    let named = FAMILIES
        .iter()
        .filter(|f| f.gguf == architecture && mixes(f));
    let first = named.clone().next()?;
    let shares = |f: &&Family| f.mixture.as_ref().is_some_and(|m| m.shared.is_some());
    Some(match (first.windows, window) {
        (Windows::None, true) => named.clone().nth(1).unwrap_or(first),
        _ if shared => named.clone().find(shares).unwrap_or(first),
        _ => first,
    })
}

/// The names that GGUFs have for the families.
pub(super) fn architectures() -> Vec<&'static str> {
    let mut names: Vec<&str> = vec![];
    for family in &FAMILIES {
        if !names.contains(&family.gguf) {
            names.push(family.gguf);
        }
    }
    names
}
