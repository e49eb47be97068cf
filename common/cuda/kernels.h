// Every kernel of the device: its name, parameters, and how it is launched. The truth for whoever launches one; the
// `.cu` files define what is declared here, so that a definition cannot differ.
//
// Conventions
// - Names end in the storage type of the activations: `_f32`, `_bf16` or, where scoring needs it, `_f16` (T below). Sums are
//   float32 always.
// - All matrices are row-major without gaps unless a stride is named. `int` is 32 bits, `long long` 64.
// - The residual stream and its gradient are float32 in all of them: products add to it (GEMM with beta = 1), norms read
//   it and write T. Vectors (norm weights, biases) and all gradients of parameters are float32, logits too.
// - A pointer marked "or null" may be null; what it stands for is then left out.
// - Launch: grid (x, y, z), block (threads, 1, 1) with `threads` the first argument of KERNEL, dynamic shared memory 0
//   unless a rule is given. A grid with a zero is not to be launched. Over 48 KiB of dynamic shared memory needs
//   CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES on the device.
// - Buffers begin at multiples of 16 bytes, vectors (weights of norms, biases, tables of angles) anywhere.
// - No kernel uses atomics on floats: the same input gives the same bits.
#pragma once
#include "device.h"

// ---- Rows -----------------------------------------------------------------------------------------------------------

// out[r] = float32(table[tokens[r]]) · scale: `table` [vocab, width], `out` [count, width].
// Grid (count).
#define EMBED(name, T) KERNEL(256, name, const T* table, const int* tokens, float scale, float* out, int width)
EMBED(embed_f32, float);
EMBED(embed_bf16, bf16);
EMBED(embed_f16, f16);

// target[rows[u]] += Σ x[order[i]] for i in starts[u] .. starts[u+1], in that order: the gradient of any gather, each
// target row given once. For an embedding: rows = the distinct tokens, order = the batch's rows sorted by token.
// `x` [*, width], `rows` [distinct], `starts` [distinct + 1], `order` [starts[distinct]].
// Grid (distinct).
KERNEL(256, add_rows, const float* x, const int* rows, const int* starts, const int* order, float* target, int width);

// How rows are normed.
struct NormKind {
    float eps;
    int centred;  // their means are subtracted first
};

// out[r] = x[i] / √(mean(x[i]²) + eps) · weight, x[i] less its mean where that is centred, with i = rows[r] (or r where
// `rows` is null): `out` [count, width].
// Grid (ceil(count / 8)) for rows up to NORM_NARROW wide, which warps work on alone, else (count).
constexpr int NORM_NARROW = 1024;
#define RMS_NORM(name, T) KERNEL(256, name, const float* x, const int* rows, const float* weight, NormKind kind, T* out, \
    int count, int width)
RMS_NORM(rms_norm_f32, float);
RMS_NORM(rms_norm_bf16, bf16);
RMS_NORM(rms_norm_f16, f16);

// Its gradient: dx[r] = (add ? dx[r] : 0) + ∂L/∂x[i], `dx` [count, width] (not gathered: with `rows`, follow with
// add_rows). `dx_copy` [count, width] or null receives dx[r] as T. `partial` [blocks, width] or null receives each
// block's part of ∂L/∂weight: add them up with sum_columns_f32(…, add = 1). A block takes ceil(count / blocks) rows.
// Grid (blocks): min(count, 264). Shared memory: width · 4 bytes, eight times that up to NORM_NARROW.
#define RMS_NORM_BACKWARD(name, T) KERNEL(256, name, const float* x, const int* rows, const float* weight, NormKind kind, \
    const T* dy, float* dx, T* dx_copy, float* partial, int count, int width, int add)
RMS_NORM_BACKWARD(rms_norm_backward_f32, float);
RMS_NORM_BACKWARD(rms_norm_backward_bf16, bf16);

// The residual stream gains what a norm makes of `given`: sum[r] += norm of given[r], both [count, width]. Grid as above.
KERNEL(256, rms_norm_add, const float* given, const float* weight, NormKind kind, float* sum, int count, int width);
// Its gradient: `d_given` [count, width] is set, given that of the stream, `dy` [count, width]. `partial`, grid and shared
// memory as for RMS_NORM_BACKWARD.
#define RMS_NORM_ADD_BACKWARD(name, T) KERNEL(256, name, const float* given, const float* weight, NormKind kind, \
    const float* dy, T* d_given, float* partial, int count, int width)
RMS_NORM_ADD_BACKWARD(rms_norm_add_backward_f32, float);
RMS_NORM_ADD_BACKWARD(rms_norm_add_backward_bf16, bf16);

// Norms parts of each row of `x` in place, each `width` columns by a weight of its own, `weight` [parts, width]: all query heads
// of a token as one, or each, or the same of key heads. Rows begin `stride` elements apart; `stride` and `x` are multiples of four
// elements where `width` is. Grid (as above, parts).
#define RMS_NORM_PART(name, T) KERNEL(256, name, T* x, const float* weight, NormKind kind, int count, int width, int stride)
RMS_NORM_PART(rms_norm_part_f32, float);
RMS_NORM_PART(rms_norm_part_bf16, bf16);
RMS_NORM_PART(rms_norm_part_f16, f16);
// Its gradient, in place: the columns of `d` become those of `x`, which is as it was before; both with rows as above. `partial`
// [blocks, parts, width].
#define RMS_NORM_PART_BACKWARD(name, T) KERNEL(256, name, const T* x, const float* weight, NormKind kind, T* d, \
    float* partial, int count, int width, int stride)
RMS_NORM_PART_BACKWARD(rms_norm_part_backward_f32, float);
RMS_NORM_PART_BACKWARD(rms_norm_part_backward_bf16, bf16);

// x[r] += bias: `x` [count, width]. Grid (count). Type: that of x (bias is float32).
#define ADD_BIAS(name, T) KERNEL(256, name, T* x, const float* bias, int width)
ADD_BIAS(add_bias_f32, float);
ADD_BIAS(add_bias_bf16, bf16);
ADD_BIAS(add_bias_f16, f16);

// out[b, c] = (add ? out[b, c] : 0) + Σ x[r, c] over the rows r of part b of ceil(count / parts): `x` [count, width],
// `out` [parts, width]. A gradient of a bias: once into parts of some 64 rows, then once more with parts = 1, add = 1.
// Grid (ceil(width / 32), parts).
#define SUM_COLUMNS(name, T) KERNEL(256, name, const T* x, float* out, int count, int width, int add)
SUM_COLUMNS(sum_columns_f32, float);
SUM_COLUMNS(sum_columns_bf16, bf16);

// What a gated MLP makes of gate g and up u: g·σ(c·g·(1 + a·g²))·(u + plus), g at most the limit, u within plus and minus it.
// SiLU is c = 1, a = 0; GELU by tanh is c = √(8/π), a = 0.044715; both have an infinite limit and plus = 0.
struct Curve {
    float c, a, limit, plus;
};

// out = scale times that: `gate_up` [count, 2·ffn] is [gate | up], `out` [count, ffn]. Grid (count, ceil(ffn / 1024)).
#define ACTIVATION(name, T) KERNEL(256, name, const T* gate_up, T* out, int ffn, Curve curve, float scale)
ACTIVATION(activation_f32, float);
ACTIVATION(activation_bf16, bf16);
ACTIVATION(activation_f16, f16);

// Replaces `gate_up` by its gradient, given that of the output, `dy` [count, ffn]; `inner` [count, ffn] or null
// receives the output again (the down projection's gradient wants it); it may be `dy` itself.
// Grid (count, ceil(ffn / 1024)).
#define ACTIVATION_BACKWARD(name, T) KERNEL(256, name, T* gate_up, const T* dy, T* inner, int ffn, Curve curve)
ACTIVATION_BACKWARD(activation_backward_f32, float);
ACTIVATION_BACKWARD(activation_backward_bf16, bf16);

// ---- What layers take in beside the residual stream -----------------------------------------------------------------

// out = scale times what a gated MLP makes of gates and inputs: `gates`, `out` [count, width], rows of `inputs` begin `stride`
// elements apart. Grid (count).
#define LAYER_INPUT(name, T) KERNEL(256, name, const T* gates, const float* inputs, T* out, int width, int stride, \
    Curve curve, float scale)
LAYER_INPUT(layer_input_f32, float);
LAYER_INPUT(layer_input_bf16, bf16);
LAYER_INPUT(layer_input_f16, f16);

// Given the gradient of that output (of scale 1) in `inner`: `gates` become theirs, `inner` becomes the output, and `d_inputs`,
// whose rows lie as those of `inputs` do, is set. Grid (count).
#define LAYER_INPUT_BACKWARD(name, T) KERNEL(256, name, T* gates, const float* inputs, T* inner, float* d_inputs, \
    int width, int stride, Curve curve)
LAYER_INPUT_BACKWARD(layer_input_backward_f32, float);
LAYER_INPUT_BACKWARD(layer_input_backward_bf16, bf16);

// Copies the first `width` columns of rows that begin `from_stride` and `to_stride` elements apart. Grid (rows).
#define COPY_COLUMNS(name, T) KERNEL(256, name, const T* from, T* to, int width, int from_stride, int to_stride)
COPY_COLUMNS(copy_columns_f32, float);
COPY_COLUMNS(copy_columns_bf16, bf16);
COPY_COLUMNS(copy_columns_f16, f16);

// Of columns of `d` whose rows begin `stride` elements apart, and `sum` [rows, width]: `sum` gains `d`, or, without `gather`,
// `d` gains `sum`. Grid (rows).
#define LENT_GRADIENT(name, T) KERNEL(256, name, T* d, float* sum, int width, int stride, int gather)
LENT_GRADIENT(lent_gradient_f32, float);
LENT_GRADIENT(lent_gradient_bf16, bf16);

// ---- Mixtures of experts --------------------------------------------------------------------------------------------
// A token's MLP is the weighted sum of `used` of `experts` MLPs, which a router chooses. A row is a token at one of its
// experts: rows = count·used. The rows of an expert lie together, in the order of their tokens. Nothing of this is known to
// the host, so that a step with it is a graph like any other. Where there is one more expert, which all tokens go to, its rows
// are after these, a token each.

// Rows, and columns, of an expert that a block multiplies at a time; and the most experts that there are kernels for.
constexpr int EXPERT_TILE = 128;
constexpr int MOST_EXPERTS = 512;

struct ExpertTile {
    int expert;
    int first; // its first row
    int rows;  // 1 … EXPERT_TILE; 0: nothing to do
};

// How experts are chosen.
struct Routing {
    float logits; // what logits are multiplied by, first; not that of a gate
    int experts;
    int used;    // by a token
    int outputs; // of the router: one more than experts where a gate says what the expert for all tokens counts
    int each;    // rows of a token: one more than used where there is that expert
    int sigmoid; // scores are the sigmoids of logits; else their soft-max
    int normed;  // what is chosen counts by its score over their sum and `plus`, or over `least` where that is less; else by its score
    float least;
    float plus;  // 0 with a soft-max
    float scale; // times this
};

// `scores` [count, outputs]: the router's logits become scores, that of a gate its sigmoid. `chosen` [count, used]: the experts
// of the largest scores, or of those plus `selection` [experts] where that is not null; the best first, of equals the first;
// `worth` [count, used]: what they count, before their factors. `places` and `weights` of the expert for all tokens are set (see `place_rows`).
// Grid (ceil(count / 8)).
KERNEL(256, route, float* scores, const float* selection, int* chosen, float* worth, int* places, float* weights, int count,
    Routing how);

// counts[e] = how many of `chosen` [rows] are e. Grid (experts).
KERNEL(256, count_rows, const int* chosen, int* counts, int rows);

// Where rows lie: starts[e] .. starts[e+1] are expert e's, `starts` [experts + 1]. `places` [count, each] is the row of each
// of `chosen`, and that at the expert for all tokens; `tokens` [rows] whose a row is, `weights` [rows] what it counts: its
// worth, times its expert's of `factors` [experts] where that is not null. `tiles`
// [tile_count] cover all rows; there are at most rows / EXPERT_TILE + min(experts, rows), and what is left of them gets no rows.
// Grid (experts).
KERNEL(256, place_rows, const int* chosen, const float* worth, const float* factors, const int* counts, int* starts,
    int* places, int* tokens, float* weights, ExpertTile* tiles, int rows, int used, int each, int tile_count);

// y[r] = x[i]·W_eᵀ for the rows r of each expert e, with i = tokens[r] (or r where `tokens` is null): `x` [*, k], `y` [rows, n].
// W_e [n, k] is at `weights` + e·stride. EXPERT_COLUMNS: y[r] = x[i]·W_e with W_e [k, n]. n, k and `stride` are multiples of 8,
// and matrices begin where 16 bytes can be read. What a row becomes does not depend on its place. `biases` [experts, n] or null:
// y[r] gains `share` times its expert's. Grid (ceil(n / EXPERT_TILE), tile_count). Shared: EXPERT_SHARED bytes.
constexpr int EXPERT_SHARED = 4 * 2 * EXPERT_TILE * 80;
#define EXPERT_PRODUCT(name, T) DENSE_KERNEL(256, 2, name, const T* x, const int* tokens, const T* weights, \
    long long stride, const ExpertTile* tiles, const float* biases, float share, T* y, int n, int k)
EXPERT_PRODUCT(expert_rows_f32, float);
EXPERT_PRODUCT(expert_rows_bf16, bf16);
EXPERT_PRODUCT(expert_rows_f16, f16);
EXPERT_PRODUCT(expert_columns_f32, float);
EXPERT_PRODUCT(expert_columns_bf16, bf16);

// The gradient of weights: G_e += Σ dy[i]ᵀ·x[j] over the rows r of each expert, i = dy_tokens[r] (or r where null), j likewise:
// `dy` [*, m], `x` [*, n], G_e [m, n] float32 at `gradients` + e·stride.
// Grid (ceil(n / EXPERT_TILE), ceil(m / EXPERT_TILE), experts). Shared: EXPERT_SHARED bytes.
#define EXPERT_GRADIENT(name, T) DENSE_KERNEL(256, 2, name, const T* dy, const int* dy_tokens, const T* x, \
    const int* x_tokens, const int* starts, float* gradients, long long stride, int m, int n)
EXPERT_GRADIENT(expert_gradient_f32, float);
EXPERT_GRADIENT(expert_gradient_bf16, bf16);

// out[t] = (keep ? out[t] : 0) + scale·Σ weights[row]·given[row] over the token's rows places[t, 0 .. used], in that order;
// `weights` null: of 1. `given` [rows, width] of the first type named, `out` [count, width] of the second. Grid (count).
#define MIX(name, T, O) KERNEL(256, name, const T* given, const int* places, const float* weights, O* out, int width, \
    int used, float scale, int keep)
MIX(mix_f32_f32, float, float);
MIX(mix_bf16_f32, bf16, float);
MIX(mix_f16_f32, f16, float);
MIX(mix_bf16_bf16, bf16, bf16);

// As ACTIVATION_BACKWARD, of rows that count weights[r]: `dy` [rows, ffn] is the gradient of the output as if each counted 1,
// and becomes weights[r]·output; d_weights[r] = Σ dy∘output. Grid (rows).
#define EXPERT_ACTIVATION_BACKWARD(name, T) KERNEL(256, name, T* gate_up, T* dy, const float* weights, \
    float* d_weights, int ffn, Curve curve)
EXPERT_ACTIVATION_BACKWARD(expert_activation_backward_f32, float);
EXPERT_ACTIVATION_BACKWARD(expert_activation_backward_bf16, bf16);

// What rows' weights count beside that, since biases count with their rows: d_weights[r] += Σ dy[tokens[r]]∘biases[e], `dy`
// [*, width] being the gradient of what experts give, `biases` [experts, width]. Grid (tile_count).
#define EXPERT_BIAS_WEIGHTS(name, T) KERNEL(256, name, const T* dy, const int* tokens, const float* biases, \
    const ExpertTile* tiles, float* d_weights, int width)
EXPERT_BIAS_WEIGHTS(expert_bias_weights_f32, float);
EXPERT_BIAS_WEIGHTS(expert_bias_weights_bf16, bf16);

// The gradient of biases: gradients[e] += Σ weights[r]·dy[i] over the rows r of each expert, i = tokens[r] (or r where null; `weights`
// null: of 1): `dy` [*, width], `gradients` [experts, width]. Grid (ceil(width / 256), experts).
#define EXPERT_BIAS_GRADIENT(name, T) KERNEL(256, name, const T* dy, const int* tokens, const float* weights, \
    const int* starts, float* gradients, int width)
EXPERT_BIAS_GRADIENT(expert_bias_gradient_f32, float);
EXPERT_BIAS_GRADIENT(expert_bias_gradient_bf16, bf16);

// The gradient of the router's logits, `d_logits` [count, outputs], given that of each row's weight and what `route` and
// `place_rows` made. Grid (ceil(count / 8)).
#define ROUTE_BACKWARD(name, T) KERNEL(256, name, const float* scores, const int* chosen, const int* places, \
    const float* weights, const float* d_weights, T* d_logits, int count, Routing how)
ROUTE_BACKWARD(route_backward_f32, float);
ROUTE_BACKWARD(route_backward_bf16, bf16);

// The gradient of experts' factors: gradients[e] += Σ worth·d_weights over the rows of each expert. Grid (experts).
KERNEL(256, factor_gradient, const int* chosen, const float* worth, const int* places, const float* d_weights,
    float* gradients, int rows, int used, int each);

// ---- Queries, keys and values ---------------------------------------------------------------------------------------
// A row that attention reads is [q: query·dim | k: kv·dim | v: kv·dim], width = (query + 2·kv)·dim.
// A row of the cache of one layer is its tail, [k | v], 2·kv·dim wide, whatever token it belongs to.

// What a row of the fused projection has after its queries, and what becomes of that.
enum class Values : int {
    Given,  // [k | v]: values stay as they are
    Normed, // [k | v]: value heads are normed, by no weights
    Keys,   // [k]: values are the keys as they come (with their bias), normed so
    None,   // nothing: keys and values of `qkv` are left alone, and the cache
};

// qkv = in + bias, its query and key heads normed (RMS, by q_norm and k_norm [dim]) and rotated to `positions`
// [count], or, with `norms_last`, rotated and then normed: dimension i is paired with i + dim/2; `cos` and `sin` are
// [rows, dim/2], or null: no rotation. A position's row is its own for keys, and so many rows after the row `queries` for
// queries (0: the same). `in` may be `qkv` where its rows are as long (but is wanted unchanged by the backward pass where
// heads are normed). `bias`, as long as a row of `in`, or null; `q_norm`, `k_norm` both or null, where there are no keys
// `q_norm` alone. `cache` or null: row cache_rows[r] of it receives [k | v] of row r; below 0: none. A head is given L lanes:
// the smallest power of two that is at least dim/8 (dim/2 where dim is no multiple of 8), at most 32. A row of `in` has
// `skipped` more elements (a multiple of `dim`) after q: the gates of gated attention. Grid (ceil(count·(query + 2·kv)·L / 256)).
#define QKV_ROPE(name, T) KERNEL(256, name, const T* in, T* qkv, const float* bias, const float* q_norm, \
    const float* k_norm, float eps, const float* cos, const float* sin, int queries, int norms_last, Values values, \
    const int* positions, T* cache, const int* cache_rows, int count, int query, int kv, int dim, int skipped)
QKV_ROPE(qkv_rope_f32, float);
QKV_ROPE(qkv_rope_bf16, bf16);
QKV_ROPE(qkv_rope_f16, f16);

// Its gradient, in place: rows of `d_qkv`, which stay `width` long, begin with that of `in` (which has no gates there). `in`,
// `bias`, `q_norm`, `k_norm` as above (`in` is read only where heads are normed). `partial` [blocks, 2·dim] or null receives each
// block's part of the gradients of [q_norm | k_norm], without `k_norm` [blocks, dim]: add them up with sum_columns_f32. A block
// takes ceil(count / blocks) rows. (The gradient of `bias` is sum_columns of the result, where its rows are as long.)
// Grid (blocks): min(count, 1056). Shared memory: 512/L·dim · 4 bytes with head norms, else 0.
#define QKV_ROPE_BACKWARD(name, T) KERNEL(256, name, const T* in, T* d_qkv, const float* bias, const float* q_norm, \
    const float* k_norm, float eps, const float* cos, const float* sin, int queries, int norms_last, Values values, \
    const int* positions, float* partial, int count, int query, int kv, int dim, int skipped)
QKV_ROPE_BACKWARD(qkv_rope_backward_f32, float);
QKV_ROPE_BACKWARD(qkv_rope_backward_bf16, bf16);

// ---- Gates ----------------------------------------------------------------------------------------------------------
// What is gated is [count, width]; gates, and their gradients, are columns of a fused projection, whose rows are `stride`
// elements long. Where widths are multiples of four, so are the columns' first and `stride`.

// Gated attention: out[r] = x[r]·σ(gates[r]); `out` may be `x`. Grid (count, ceil(width / 1024)).
#define GATE(name, T) KERNEL(256, name, const T* x, const T* gates, T* out, int width, int stride)
GATE(gate_f32, float);
GATE(gate_bf16, bf16);
GATE(gate_f16, f16);

// Its gradient: `d`, that of out, becomes that of x, and `d_gates` that of the gates. Grid as above.
#define GATE_BACKWARD(name, T) KERNEL(256, name, const T* x, const T* gates, T* d, T* d_gates, int width, int stride)
GATE_BACKWARD(gate_backward_f32, float);
GATE_BACKWARD(gate_backward_bf16, bf16);

// The columns of d_qkv [count, width], [q | k | v], where rows of `d_raw` have them, `skipped` elements being left alone between
// the `query_width` of q and k. Grid (count, ceil(width / 1024)).
#define SPREAD_QKV(name, T) KERNEL(256, name, const T* d_qkv, T* d_raw, int query_width, int width, int skipped)
SPREAD_QKV(spread_qkv_f32, float);
SPREAD_QKV(spread_qkv_bf16, bf16);

// Linear attention: of each of `heads` of a row, out = norm(read)·SiLU(gates), the norm an RMSNorm of `dim` elements;
// width = heads·dim; `out` may be `read`. Grid (ceil(count·heads / 8)).
#define GATED_NORM(name, T) KERNEL(256, name, const T* read, const T* gates, const float* weight, float eps, T* out, \
    int count, int heads, int dim, int stride)
GATED_NORM(gated_norm_f32, float);
GATED_NORM(gated_norm_bf16, bf16);
GATED_NORM(gated_norm_f16, f16);

// Its gradient: `d`, that of out, becomes that of what was read, and `d_gates` that of the gates. `partial` [blocks, dim] or
// null receives each block's part of that of `weight`. A block takes ceil(count / blocks) rows.
// Grid (blocks): min(count, 264). Shared memory: 8·dim · 4 bytes.
#define GATED_NORM_BACKWARD(name, T) KERNEL(256, name, const T* read, const T* gates, const float* weight, float eps, T* d, \
    T* d_gates, float* partial, int count, int heads, int dim, int stride)
GATED_NORM_BACKWARD(gated_norm_backward_f32, float);
GATED_NORM_BACKWARD(gated_norm_backward_bf16, bf16);

// ---- Linear attention by the gated delta rule -----------------------------------------------------------------------
// common/src/kernels/delta says what it is. A row of the fused projection, `raw`, is [q | k | v | z | b | a]; what the rule
// reads, `qkv` [T, qkv_width], is [q | k | v] after the convolution, queries and keys of length 1 (queries over √key_dim);
// `gates` [T, 2·value_heads] are decays, then rates, float32.

struct DeltaHeads {
    int key_heads;
    int value_heads; // each key head serves value_heads / key_heads
    int key_dim;     // at most MOST_KEY_DIM
    int value_dim;
    int kernel;      // tokens that the convolution sees

    __device__ int key_width() const { return key_heads * key_dim; }
    __device__ int value_width() const { return value_heads * value_dim; }
    __device__ int qkv_width() const { return 2 * key_width() + value_width(); }
    __device__ int raw_width() const { return qkv_width() + value_width() + 2 * value_heads; }
};
constexpr int MOST_KEY_DIM = 128;

// A segment of the batch. Those of a group follow each other, the root first.
struct DeltaSegment {
    int first;      // its first row
    int rows;
    int prefix;     // the first row of the root that it continues
    int prefix_len; // the root's length; 0 for a root
    int end;        // one past the last row that sees it: its own end; for a root, its last branch's
};

// qkv of `count` rows; `segment_of` [count] is the segment of each row. `conv` [qkv_width, kernel], the oldest token's first.
// Grid (ceil(count·(2·key_heads + value_heads) / 8)).
#define DELTA_INPUTS(name, T) KERNEL(256, name, const T* raw, const int* segment_of, const DeltaSegment* segments, \
    const float* conv, T* qkv, int count, DeltaHeads heads)
DELTA_INPUTS(delta_inputs_f32, float);
DELTA_INPUTS(delta_inputs_bf16, bf16);
DELTA_INPUTS(delta_inputs_f16, f16);

// The gradient of `qkv`, `d_qkv`, becomes that of the convolution's result. Grid as above.
#define DELTA_INPUTS_BACKWARD(name, T) KERNEL(256, name, const T* raw, const int* segment_of, const DeltaSegment* segments, \
    const float* conv, T* d_qkv, int count, DeltaHeads heads)
DELTA_INPUTS_BACKWARD(delta_inputs_backward_f32, float);
DELTA_INPUTS_BACKWARD(delta_inputs_backward_bf16, bf16);

// From there to columns [q | k | v] of `d_raw`: what a row gave to the convolutions that see it. Grid (count).
#define DELTA_CONV_BACKWARD(name, T) KERNEL(256, name, const T* d_convolved, const int* segment_of, \
    const DeltaSegment* segments, const float* conv, T* d_raw, DeltaHeads heads)
DELTA_CONV_BACKWARD(delta_conv_backward_f32, float);
DELTA_CONV_BACKWARD(delta_conv_backward_bf16, bf16);

// And to `conv`'s: `partial` [parts, qkv_width·kernel], part by part of ceil(count / parts) rows.
// Grid (ceil(qkv_width / 256), parts).
#define DELTA_CONV_GRADIENT(name, T) KERNEL(256, name, const T* raw, const T* d_convolved, const int* segment_of, \
    const DeltaSegment* segments, float* partial, int count, DeltaHeads heads)
DELTA_CONV_GRADIENT(delta_conv_gradient_f32, float);
DELTA_CONV_GRADIENT(delta_conv_gradient_bf16, bf16);

// gates of `count` rows. Grid (ceil(count·value_heads / 256)).
#define DELTA_GATES(name, T) KERNEL(256, name, const T* raw, const float* dt_bias, const float* a_log, float* gates, \
    int count, DeltaHeads heads)
DELTA_GATES(delta_gates_f32, float);
DELTA_GATES(delta_gates_bf16, bf16);
DELTA_GATES(delta_gates_f16, f16);

// Columns [b | a] of `d_raw`, given the gradients of the decays' logarithms and of rates, `d_gates` [count, 2·value_heads].
// `partial` [blocks, 2·value_heads] or null receives each block's part of those of [dt_bias | a_log]. A block takes
// ceil(count / blocks) rows. Grid (blocks), any.
#define DELTA_GATES_BACKWARD(name, T) KERNEL(256, name, const T* raw, const float* dt_bias, const float* a_log, \
    const float* d_gates, T* d_raw, float* partial, int count, DeltaHeads heads)
DELTA_GATES_BACKWARD(delta_gates_backward_f32, float);
DELTA_GATES_BACKWARD(delta_gates_backward_bf16, bf16);

// The walks over tokens. Memories are numbered: `memories` [*, value_heads, key_dim, value_dim], float32. Names end in the
// storage type and the length of keys that they are made for: 32, 64, 128 (D); the smallest that is at least key_dim.
constexpr int DELTA_COLUMNS = 16; // of a memory, to a warp

struct DeltaSpan {
    int first;  // the first row
    int rows;   // may be 0
    int from;   // the memory that it begins with is the sum of `froms` memories from this one on
    int froms;
    int to;     // where it leaves its memory behind; below 0: nowhere
};

// read [*, value_width]: what the tokens of each of `spans` find. Spans of a launch do not wait for each other.
// Grid (value_heads·ceil(value_dim / 64), spans). Shared: 64·(2·D + 2·64 + 4).
#define DELTA_SCAN(name, T, D) KERNEL(128, name, const T* qkv, const float* gates, const DeltaSpan* spans, \
    float* memories, T* read, DeltaHeads heads)

#define DELTA_VARIANTS_F16(kind, stem) kind(stem##_f16_32, f16, 32); kind(stem##_f16_64, f16, 64); kind(stem##_f16_128, f16, 128)
#define DELTA_VARIANTS(kind, stem) \
    kind(stem##_f32_32, float, 32); kind(stem##_f32_64, float, 64); kind(stem##_f32_128, float, 128); \
    kind(stem##_bf16_32, bf16, 32); kind(stem##_bf16_64, bf16, 64); kind(stem##_bf16_128, bf16, 128)
DELTA_VARIANTS(DELTA_SCAN, delta_scan);
DELTA_VARIANTS_F16(DELTA_SCAN, delta_scan);

// The way back goes over the tokens three times, forth, back and forth; nothing but vectors is kept of them. Memories of roots
// that the first pass leaves serve the third, whose spans are the same; those of the second are gradients, of what a branch
// began with, numbered apart. `d_read` [T, value_width] is given.
// A head's columns come in strips of 128; what sums over columns is float32 [T, value_heads, strips, key_dim].
// Grid (value_heads·strips, spans). Shared: 64·(2·D + 2·128 + 4) + 256·D.
constexpr int DELTA_STRIP = 128;

// Forth: `lack` [T, value_width] is v − (a·S)ᵀk, what a memory lacked of a token; `d_query` that of queries.
#define DELTA_TRACE(name, T, D) DENSE_KERNEL(256, 2, name, const T* qkv, const float* gates, const T* d_read, \
    const DeltaSpan* spans, float* memories, float* lack, float* d_query, DeltaHeads heads)
DELTA_VARIANTS(DELTA_TRACE, delta_trace);

// Back: `d_learnt` [T, value_width] is the gradient of what a memory learnt, rate·lack; `d_key` that of keys as far as they
// say where that goes.
#define DELTA_BACK(name, T, D) DENSE_KERNEL(256, 2, name, const T* qkv, const float* gates, const T* d_read, const float* lack, \
    const DeltaSpan* spans, float* memories, float* d_learnt, float* d_key, DeltaHeads heads)
DELTA_VARIANTS(DELTA_BACK, delta_back);

// Forth again: `d_key` loses what keys are owed as far as they say what is lacking.
#define DELTA_AGAIN(name, T, D) DENSE_KERNEL(256, 2, name, const T* qkv, const float* gates, const float* lack, \
    const float* d_learnt, const DeltaSpan* spans, float* memories, float* d_key, DeltaHeads heads)
DELTA_VARIANTS(DELTA_AGAIN, delta_again);

// What they found brought together: `d_qkv` [count, qkv_width], the rates' half of `d_gates` [count, 2·value_heads], and
// `terms` [count, value_heads], of which the decays' half will be sums. Grid (ceil(count·key_heads / 8)).
#define DELTA_GRADIENTS(name, T) KERNEL(256, name, const T* qkv, const float* gates, const float* lack, \
    const float* d_learnt, const float* d_query, const float* d_key, T* d_qkv, float* terms, float* d_gates, int count, \
    DeltaHeads heads)
DELTA_GRADIENTS(delta_gradients_f32, float);
DELTA_GRADIENTS(delta_gradients_bf16, bf16);

// The decays' half: the sum of `terms` from a row on, over all rows that see it. Grid (value_heads, segments).
KERNEL(256, delta_decays, const float* terms, const DeltaSegment* segments, float* d_gates, int value_heads);

// Decoding: one token of each of `count` slots. Slot s goes on from memory from[s], and from the rows of [q | k | v] before the
// convolution that lie there in `past` [*, kernel − 1, qkv_width], the oldest first; both are left as number s's. Slots that
// are `finished` [count] are left alone.
// Grids as for DELTA_INPUTS, and (value_heads·ceil(value_dim / 64), count) with shared memory as for DELTA_SCAN.
#define DELTA_STEP_INPUTS(name, T) KERNEL(256, name, const T* raw, T* past, const int* from, const int* finished, \
    const float* conv, T* qkv, int count, DeltaHeads heads)
DELTA_STEP_INPUTS(delta_step_inputs_f32, float);
DELTA_STEP_INPUTS(delta_step_inputs_bf16, bf16);
#define DELTA_STEP(name, T, D) KERNEL(128, name, const T* qkv, const float* gates, const int* from, const int* finished, \
    float* memories, T* read, DeltaHeads heads)
DELTA_VARIANTS(DELTA_STEP, delta_step);

// The last rows of each of `spans` into `past`, where it leaves its memory. Grid (ceil(qkv_width / 256), spans).
#define DELTA_KEEP(name, T) KERNEL(256, name, const T* raw, const DeltaSpan* spans, T* past, DeltaHeads heads)
DELTA_KEEP(delta_keep_f32, float);
DELTA_KEEP(delta_keep_bf16, bf16);

// ---- Short convolutions between gates -------------------------------------------------------------------------------
// common/src/kernels/gated_conv.rs says what they are. A row of the fused projection, `raw`, is [b | c | x], each of so many
// `channels`; `out` [T, channels] is c·conv(b·x). `weight` [channels, kernel], the oldest token's first; segments as above.
// Grid (rows, ceil(channels / 256)).
#define GATED_CONV(name, T) KERNEL(256, name, const T* raw, const int* segment_of, const DeltaSegment* segments, \
    const float* weight, T* out, int channels, int kernel)
GATED_CONV(gated_conv_f32, float);
GATED_CONV(gated_conv_bf16, bf16);
GATED_CONV(gated_conv_f16, f16);

// The gradient of `raw`, given that of `out`. Grid as above.
#define GATED_CONV_BACKWARD(name, T) KERNEL(256, name, const T* raw, const int* segment_of, const DeltaSegment* segments, \
    const float* weight, const T* d_out, T* d_raw, int channels, int kernel)
GATED_CONV_BACKWARD(gated_conv_backward_f32, float);
GATED_CONV_BACKWARD(gated_conv_backward_bf16, bf16);

// That of `weight`: `partial` [parts, channels·kernel], part by part of ceil(count / parts) rows.
// Grid (ceil(channels / 256), parts).
#define GATED_CONV_GRADIENT(name, T) KERNEL(256, name, const T* raw, const int* segment_of, const DeltaSegment* segments, \
    const T* d_out, float* partial, int count, int channels, int kernel)
GATED_CONV_GRADIENT(gated_conv_gradient_f32, float);
GATED_CONV_GRADIENT(gated_conv_gradient_bf16, bf16);

// Decoding: one token of each slot, which goes on from b·x of the last tokens, `past` [*, kernel − 1, channels] at from[slot],
// the oldest first; they are left as the slot's own. Slots that are `finished` are left alone. Grid (slots, ceil(channels / 256)).
#define GATED_CONV_STEP(name, T) KERNEL(256, name, const T* raw, float* past, const int* from, const int* finished, \
    const float* weight, T* out, int channels, int kernel)
GATED_CONV_STEP(gated_conv_step_f32, float);
GATED_CONV_STEP(gated_conv_step_bf16, bf16);

// b·x of the last rows of each of `spans` into `past`, where it leaves its memory. Grid (ceil(channels / 256), spans).
#define GATED_CONV_KEEP(name, T) KERNEL(256, name, const T* raw, const DeltaSpan* spans, float* past, int channels, int kernel)
GATED_CONV_KEEP(gated_conv_keep_f32, float);
GATED_CONV_KEEP(gated_conv_keep_bf16, bf16);

// ---- Attention over a packed, prefix-shared batch -------------------------------------------------------------------
// Names end in the storage type and the head size that they are made for: 16, 32, 64, 96, 128, 256, 512 (D). Take the
// smallest that is at least `dim`; any even `dim` works (multiples of 8 load in vectors).
// The batch is cut into tiles: R rows of one segment, fewer at its end. 64 in 16 bits, 32 in f32.
// Order does not matter; those with the most visible keys first balance best.
// A tile meets S rows at a time: R of them, but where D = 512 as many as 163 KiB leave room for: 64 forward and 16 backward in
// 16 bits, 16 and 8 in f32.
// Row pitch in shared memory: P(D) = (D + 16 / sizeof(T)) · sizeof(T) bytes, that of results' columns P' = P(min(D, 256)).
// Extra for f32 only: X = R·(S + 4)·4.

struct AttentionTile {
    int first;      // its first row in the batch
    int rows;       // 1 … R
    int start;      // the first row of its segment
    int prefix;     // the first row of the root that the segment continues
    int prefix_len; // the root's length, which is the position of row `start`; 0 for a root
    int end;        // one past the last row that can see this tile: the segment's end; for a root, its last branch's
};

// How products of queries and keys become scores.
struct Scores {
    float scale; // what they are multiplied by, 1/√dim or another
    float share; // scale / cap where scores are softly held within ±cap, as cap·tanh(score / cap); else 0
    float unit;  // what makes products exponents in base 2, or, under a cap, their hyperbolic tangents tanh(product·share)
};

// `qkv` [T, width] after rotation, `out` [T, query·dim], `lse` [T, query] (natural log-sum-exp of the scores).
// `window`: how many positions back a token sees, itself included; 0 for all. `sinks` [query] or null: what stands beside the
// scores of each head in the soft-max, with nothing to give.
// Grid (query, tiles, ceil(dim / 256)). Shared: R·P + S·(P + P') + X.
#define ATTENTION(name, T, D) DENSE_KERNEL(ATTENTION_THREADS(T), attention_blocks<T>(D, 5, 4), name, const T* qkv, \
    T* out, float* lse, const AttentionTile* tiles, const float* sinks, int query, int kv, int dim, int window, Scores scores)

// The queries' gradient: columns q of `d_qkv` [T, width] are set; `delta` [T, query] receives Σ dO∘O for the next.
// Grid (query, tiles, ceil(dim / 256)). Shared: 2·(R + S)·P + X.
#define ATTENTION_BACKWARD_Q(name, T, D) DENSE_KERNEL(ATTENTION_THREADS(T), attention_blocks<T>(D, 4, 3), name, \
    const T* qkv, const T* out, const float* lse, const T* d_out, float* delta, T* d_qkv, const AttentionTile* tiles, \
    int query, int kv, int dim, int window, Scores scores)

// The keys' and values' gradients as each query head makes them: `d_heads` [T, query, k | v, dim], float32. Run after
// ATTENTION_BACKWARD_Q, which makes `delta`. `positions` [T] of every row in its sequence (read with a window only, else
// null will do). Sums over branches run inside a block, in one order.
// Grid (query, tiles, ceil(dim / 128)). Shared: 2·(R + S)·P + X + 3·S·4.
#define ATTENTION_BACKWARD_KV(name, T, D) DENSE_KERNEL(ATTENTION_THREADS(T), attention_blocks<T>(D, 3, 2), name, \
    const T* qkv, const float* lse, const T* d_out, const float* delta, const int* positions, float* d_heads, \
    const AttentionTile* tiles, int query, int kv, int dim, int window, Scores scores)

// Their sums over the query heads of each key head, in order: columns k and v of `d_qkv` [count, width] are set.
// Grid (ceil(count·kv·dim / 256)).
#define SUM_HEADS(name, T) KERNEL(256, name, const float* d_heads, T* d_qkv, int count, int query, int kv, int dim)
SUM_HEADS(sum_heads_f32, float);
SUM_HEADS(sum_heads_bf16, bf16);

// The gradient of sinks: gradients[h] −= Σ exp(sinks[h] − lse)·delta over all tokens. Grid (query).
KERNEL(256, sink_gradient, const float* sinks, const float* lse, const float* delta, float* gradients, int count, int query);

#define ATTENTION_VARIANTS_F16(kind, stem) \
    kind(stem##_f16_16, f16, 16); kind(stem##_f16_32, f16, 32); kind(stem##_f16_64, f16, 64); \
    kind(stem##_f16_96, f16, 96); kind(stem##_f16_128, f16, 128); kind(stem##_f16_256, f16, 256); \
    kind(stem##_f16_512, f16, 512)

#define ATTENTION_VARIANTS(kind, stem) \
    kind(stem##_f32_16, float, 16); kind(stem##_f32_32, float, 32); kind(stem##_f32_64, float, 64); \
    kind(stem##_f32_96, float, 96); kind(stem##_f32_128, float, 128); kind(stem##_f32_256, float, 256); \
    kind(stem##_f32_512, float, 512); \
    kind(stem##_bf16_16, bf16, 16); kind(stem##_bf16_32, bf16, 32); kind(stem##_bf16_64, bf16, 64); \
    kind(stem##_bf16_96, bf16, 96); kind(stem##_bf16_128, bf16, 128); kind(stem##_bf16_256, bf16, 256); \
    kind(stem##_bf16_512, bf16, 512)

ATTENTION_VARIANTS(ATTENTION, attention);
ATTENTION_VARIANTS_F16(ATTENTION, attention);
ATTENTION_VARIANTS(ATTENTION_BACKWARD_Q, attention_backward_q);
ATTENTION_VARIANTS(ATTENTION_BACKWARD_KV, attention_backward_kv);

// ---- Decoding: one token of each of `count` sequences ---------------------------------------------------------------
// Keys and values lie in pages of PAGE = 64 rows of a layer's cache. `pages` [tables, max_pages] gives the pages of
// each table: row i of table t is cache row pages[t, i / 64]·64 + i % 64. A group's prompt has a table that all of its
// samples read; each sequence has its own for what it generated.

struct Sequence {
    int prefix_table; // of its prompt's keys
    int prefix_len;   // tokens of the prompt: the position of its first own token
    int own_table;    // of its own tokens' keys
    int limit;        // it ends after so many tokens
};

// Keys of a prompt that are worth a part of their own.
constexpr int PREFIX_SPLIT = 256;

// Rows of queries that read one prompt together: row f of kv head h is query head h·group + f % group of sequence
// order[f / group], group = query / kv: sequences of a prompt lie anywhere, and follow each other in `order`. At most R
// rows (64 bf16, 32 f32).
struct DecodeTile {
    int first;        // its first row
    int rows;         // 1 … R; 0: nothing to do
    int prefix_table;
    int prefix_len;
};

// The last token of sequence s is at positions[s], its key already in the cache (own row positions[s] − prefix_len).
// Writes partial results of the prompt's part and of the own part: `partial` [parts, count, query, dim] float32 and
// `partial_lse` [parts, count, query], parts = prefix_splits + own_splits; each split takes an equal run of keys in whole
// tiles. A prompt is split once for each PREFIX_SPLIT of its tokens, at most; what is left of prefix_splits gets nothing.
// `tiles` [tile_count] cover all rows of all sequences that matter, which are in `order`, up to [count]; what a sequence
// without them gets is undefined.
// Grid (C·(tile_count·prefix_splits·kv + ceil(count·own_splits·kv·ceil(group / 16) / W))), W = R / 16 being a block's warps
// and C = ceil(dim / 256). Shared: as for ATTENTION.
#define DECODE_ATTENTION(name, T, D) DENSE_KERNEL(ATTENTION_THREADS(T), attention_blocks<T>(D, 4, 4), name, \
    const T* qkv, const T* cache, float* partial, float* partial_lse, const Sequence* sequences, const int* positions, \
    const DecodeTile* tiles, const int* order, const int* pages, int max_pages, int count, int tile_count, \
    int prefix_splits, int own_splits, int query, int kv, int dim, int window, Scores scores)
ATTENTION_VARIANTS(DECODE_ATTENTION, decode_attention);

// out [count, query·dim] from the parts, of which there are at most 32, and `sinks` (see ATTENTION). Grid (ceil(count·query / 8)).
#define DECODE_MERGE(name, T) KERNEL(256, name, const float* partial, const float* partial_lse, const float* sinks, \
    T* out, int parts, int rows, int query, int dim)  /* rows = count·query */
DECODE_MERGE(decode_merge_f32, float);
DECODE_MERGE(decode_merge_bf16, bf16);

// How tokens are drawn, as `Sampling` of common/src/generate/sampler.rs says it.
struct SamplingParams {
    float temperature; // 0 is greedy
    float top_p;       // 1 keeps all
    float min_p;       // 0 drops none
    float repetition_penalty; // 1 changes nothing
    int top_k;         // 0 keeps all
};

// Draws a token for each sequence that is not finished. Sequence s reads row logit_rows[s] of `logits` [*, vocab] (or
// row s where null) and draws its number positions[s] + 1 − prefix_len (the first is drawn at the prompt's last token)
// with ChaCha8 under keys[s] (8 words: the hash that `sampler::stream` seeds its generator with): the numbers that the
// CPU draws. `seen` [count, ceil(vocab / 32)] or null: bit per token that occurred, prompt included; the drawn token's
// is set (null unless repetition_penalty ≠ 1). `ends` [end_count]: tokens that end a response.
// Then, for that draw number n: tokens[s] = token and logps[s] = its log-probability at temperature 1 before any penalty;
// finished[s] = 1 if it is an end token, else 2 if n + 1 = limit; and unless finished, positions[s] += 1 and
// cache_rows[s] = the cache row of its key by `pages` (finished: −1).
// Grid (count). Shared: 8·ceil(vocab / 1024) bytes.
KERNEL(512, sample, const float* logits, const int* logit_rows, int vocab, SamplingParams how, const unsigned* keys,
    unsigned* seen, const int* ends, int end_count, const Sequence* sequences, const int* pages, int max_pages,
    float* logps, int* tokens, int* positions, int* cache_rows, int* finished);

// ---- log p(target) --------------------------------------------------------------------------------------------------
// The logits of some rows for words first … first + words − 1 come from a GEMM, chunk after chunk of the vocabulary.

// Logits held softly within ±cap: x becomes cap·tanh(x / cap). Grid (min(ceil(n / 1024), 8192)).
KERNEL(256, soft_cap, float* x, long long n, float cap);

// The running state of each row: {max, Σ exp(l − max), the target's logit}, [rows, 3]. `begin` starts it afresh.
// `logits` [rows, words], `targets` [rows]. Grid (rows).
KERNEL(256, logprob_update, const float* logits, const int* targets, float* state, int words, int first, int begin);

// logps[r] = log p(target), lse[r] = log Σ exp(logits). Grid (ceil(rows / 256)).
KERNEL(256, logprob_finish, const float* state, float* logps, float* lse, int rows);

// d_logits = d_logps[r]·(onehot(target) − softmax)·slope, the slope of a soft cap being 1 − (logit·inverse_cap)², and 1 with
// an `inverse_cap` of 0: `d_logits` [rows, words] as T; in float32 it may be `logits` itself.
// Grid (ceil(words / 1024), rows) — rows at most 65535.
#define LOGPROB_BACKWARD(name, T) KERNEL(256, name, const float* logits, const int* targets, const float* lse, \
    const float* d_logps, T* d_logits, int words, int first, float inverse_cap)
LOGPROB_BACKWARD(logprob_backward_f32, float);
LOGPROB_BACKWARD(logprob_backward_bf16, bf16);

// sums[i] = Σ values[offsets[i] .. offsets[i+1]] in float64, `offsets` [count + 1]. Grid (ceil(count / 8)).
KERNEL(256, segment_sums, const float* values, const int* offsets, double* sums, int count);

// values[offsets[i] .. offsets[i+1]] = coefficients[i]: what each token's log-prob gains from its response's gradient.
// Grid (ceil(count / 8)).
KERNEL(256, spread, const float* coefficients, const int* offsets, float* values, int count);

// ---- Rewards --------------------------------------------------------------------------------------------------------

// rewards = β(policy − reference) over all responses, and per prompt p the best and the worst of r − α·length among
// offsets[p] .. offsets[p+1], exactly as common/src/reward.rs chooses (ties too); −1 where there are none. `best` and
// `worst` count from the prompt's first. All [responses] but `best`, `worst` [prompts] and `offsets` [prompts + 1].
// Grid (ceil(prompts / 8)).
KERNEL(256, rewards, const double* policy, const double* reference, const long long* lengths, const int* offsets,
    double beta, double alpha, double* rewards, int* best, int* worst, int prompts);

// ---- Training -------------------------------------------------------------------------------------------------------

// y = bfloat16(x): to the nearest, or (dithered) stochastically by the fixed noise of element number first + i, as
// `Mat::dithered` does. Grid (min(ceil(n / 1024), 8192)).
KERNEL(256, round_bf16, const float* x, bf16* y, long long n, long long first, int dithered);
// y = f16(x), to the nearest. Grid as above.
KERNEL(256, round_f16, const float* x, f16* y, long long n);
// y = float32(x). Grid as above.
KERNEL(256, widen_bf16, const bf16* x, float* y, long long n);
// x *= factor. Grid as above.
KERNEL(256, scale_f32, float* x, long long n, float factor);

// partial[b] = Σ x² over block b's run of ceil(n / blocks) elements. Grid (blocks), any; 1024 serves.
KERNEL(256, square_sum, const float* x, long long n, double* partial);
// norm[0] = √Σ partial; factor[0] = limit > 0 ? min(1, limit / (norm + 1e-6)) : 1. Grid (1).
KERNEL(256, clip, const double* partial, int blocks, double limit, double* norm, float* factor);

// A run of parameters of one kind; runs of at most 65536 elements balance well.
struct Run {
    long long first; // its first element in the flat buffers
    int len;
    int decayed;     // whether weight decay applies: matrices yes, norms and biases no
};

// AdamW as common/src/dpo/optimizer.rs computes it, on every run: p, g, m, v and `copy` are whole flat buffers. The
// gradient is taken times factor[0] and left zero. rate = learning rate / (1 − β₁ᵗ), root = √(1 − β₂ᵗ), keep = 1 −
// learning rate·λ. `copy` or null receives p as bfloat16, dithered by element number. `step` t is the counter of the
// noise that moments are rounded with. Moments: float32 (adamw_f32) or bfloat16 rounded stochastically (adamw_bf16).
// Grid (runs).
#define ADAMW(name, M) KERNEL(256, name, const Run* runs, float* p, float* g, M* m, M* v, bf16* copy, \
    const float* factor, float rate, float root, float keep, int step)
ADAMW(adamw_f32, float);
ADAMW(adamw_bf16, bf16);
