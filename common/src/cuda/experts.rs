//! Mixtures of experts on the device, forward and back: as `model/experts.rs`, but who goes where stays on the device, so that
//! a step with experts is a graph like any other, and all experts' rows are one product.

use super::args;
use super::backward::{Backward, Norm, norm_at};
use super::decoder::{Decoder, Linear, OneMlp};
use super::device::{Address, Arg, Buffer, Device, Launch, Operand, Plain, Precision, bytes_of};
use super::launches::THREADS;
use super::pass::Pass;
use crate::model::{LayerNorms, LayerParams, Matrix, MlpParams, Span};
use crate::weights::{Config, Experts, Scores};
use anyhow::{Result, ensure};

/// `EXPERT_TILE`, `MOST_EXPERTS` and `EXPERT_SHARED` of `common/cuda/kernels.h`, and the bytes of an `ExpertTile`.
const TILE: usize = 128;
const MOST: usize = 512;
const SHARED: usize = 81_920;
const TILE_BYTES: usize = 3 * size_of::<i32>();

/// How the kernels choose experts (see `kernels.h`).
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Routing {
    logits: f32,
    experts: i32,
    used: i32,
    outputs: i32,
    each: i32,
    sigmoid: i32,
    normed: i32,
    least: f32,
    plus: f32,
    scale: f32,
}

// SAFETY: ten numbers of four bytes, no padding.
unsafe impl Plain for Routing {}

impl Routing {
    fn of(how: Experts) -> Arg {
        Arg::plain(Self {
            logits: how.logit_scale,
            experts: how.count as i32,
            used: how.used as i32,
            outputs: how.outputs() as i32,
            each: how.each() as i32,
            sigmoid: i32::from(how.scores == Scores::Sigmoid),
            normed: i32::from(how.normed.is_some()),
            least: how.normed.unwrap_or(0.0),
            plus: how.plus,
            scale: how.scale,
        })
    }
}

/// Fails for mixtures that there are no kernels for.
pub(super) fn check(config: &Config) -> Result<()> {
    let Some(how) = config.mixture() else {
        return Ok(());
    };
    ensure!(
        how.count <= MOST,
        "{} experts are more than the GPU's kernels take ({MOST}): use --device cpu",
        how.count
    );
    for ffn in [Some(how.ffn), how.shared.map(|shared| shared.ffn)] {
        let ffn = ffn.unwrap_or(0);
        ensure!(
            config.hidden.is_multiple_of(8) && ffn.is_multiple_of(8),
            "experts of {} x {ffn} are no multiples of 8, as the GPU's kernels want them: use --device cpu",
            config.hidden
        );
    }
    Ok(())
}

/// The experts of a layer, and what chooses among them.
pub(super) struct Mixture {
    how: Experts,
    router: Linear,
    /// What is added to scores where the best are chosen.
    selection: Option<Buffer>,
    /// What their worth to a token is multiplied by, where they are apart.
    factors: Option<Buffer>,
    /// Expert after expert: `[gate | up]`, then the output projection.
    weights: Buffer,
    gate_up: Place,
    down: Place,
    /// Their biases, float32, `[experts, 2·ffn]` and `[experts, hidden]`.
    gate_up_bias: Option<Buffer>,
    down_bias: Option<Buffer>,
    /// The one that all tokens go to, or the MLP beside them: its rows are after theirs wherever theirs are kept.
    shared: Option<OneMlp>,
}

/// A matrix that each expert has, in all of their weights.
#[derive(Clone, Copy)]
struct Place {
    /// The first expert's, and how far it is to the next one's, elements.
    first: usize,
    stride: usize,
    rows: usize,
    cols: usize,
}

impl Mixture {
    pub fn new(
        (how, params): (Experts, &LayerParams),
        in_format: impl Fn(&Span) -> Result<Buffer>,
        linear: impl Fn(&Matrix) -> Result<Linear>,
        vector: impl Fn(&Span) -> Result<Buffer>,
    ) -> Result<Self> {
        let mlp = params.mlp();
        let (gate_up, down) = (&mlp.gate_up, &mlp.down);
        let stride = gate_up.weight.range.len() + down.weight.range.len();
        let router = params.router.as_ref().expect("experts have a router");
        let shared = params.mlps.last().filter(|_| how.shared.is_some());
        let shared = shared.or(params.beside.as_ref());
        let each = &params.mlps[..how.count];
        let matrices = each.iter().flat_map(|mlp| [&mlp.gate_up, &mlp.down]);
        let weights = of_all(matrices.map(|matrix| &matrix.weight));
        let biases = |of: fn(&MlpParams) -> &Matrix| {
            let biases = each.iter().filter_map(|mlp| of(mlp).bias.as_ref());
            how.biases.then(|| vector(&of_all(biases))).transpose()
        };
        Ok(Self {
            how,
            router: linear(router)?,
            selection: params.selection.as_ref().map(&vector).transpose()?,
            factors: params.factors.as_ref().map(&vector).transpose()?,
            weights: in_format(&weights)?,
            gate_up_bias: biases(|mlp| &mlp.gate_up)?,
            down_bias: biases(|mlp| &mlp.down)?,
            shared: shared.map(|p| OneMlp::new(p, linear)).transpose()?,
            gate_up: Place {
                first: 0,
                stride,
                rows: gate_up.rows,
                cols: gate_up.cols,
            },
            down: Place {
                first: gate_up.weight.range.len(),
                stride,
                rows: down.rows,
                cols: down.cols,
            },
        })
    }
}

/// Parameters of the experts of a layer, which follow each other, as one.
fn of_all<'a>(mut spans: impl Iterator<Item = &'a Span>) -> Span {
    let mut all = spans.next().expect("there are experts").clone();
    for span in spans {
        assert_eq!(all.range.end, span.range.start);
        all.range.end = span.range.end;
        all.tensors.extend_from_slice(&span.tensors);
    }
    all
}

/// Which tokens went to which experts, as the kernels have it; a row is a token at one of its experts. Those of the expert that
/// all tokens go to are after the others.
#[derive(Clone)]
pub struct Routes {
    /// The scores, and that of a gate, `[T, outputs]`, float32.
    scores: Buffer,
    /// `[T, used]`
    chosen: Buffer,
    worth: Buffer,
    /// `[T, each]`
    places: Buffer,
    /// `[rows]`
    tokens: Buffer,
    /// `[T · each]`
    weights: Buffer,
    /// `[experts]`, and one more
    counts: Buffer,
    starts: Buffer,
    tiles: Buffer,
    /// What the experts give, `[T · each, hidden]`, in the decoder's format; done with when they are mixed.
    given: Buffer,
}

impl Routes {
    /// The bytes that they take for each token, and those of what the experts give.
    pub fn bytes(config: &Config, precision: Precision) -> (usize, usize) {
        let Some(how) = config.mixture() else {
            return (0, 0);
        };
        let numbers = how.outputs() + 3 * how.used + 2 * how.each();
        let given = how.each() * config.hidden * bytes_of(precision);
        (numbers * size_of::<i32>(), given)
    }

    /// Room for those of so many tokens; with `shared`, what the experts give has its room there.
    pub fn new(decoder: &Decoder, tokens: usize, shared: Option<&Self>) -> Result<Option<Self>> {
        let Some(how) = decoder.config.mixture() else {
            return Ok(None);
        };
        let device = &decoder.device;
        let numbers = |count: usize| device.allocate(count * size_of::<i32>());
        let (rows, all) = (tokens * how.used, tokens * how.each());
        Ok(Some(Self {
            scores: numbers(tokens * how.outputs())?,
            chosen: numbers(rows)?,
            worth: numbers(rows)?,
            places: numbers(all)?,
            tokens: numbers(rows)?,
            weights: numbers(all)?,
            counts: numbers(how.count)?,
            starts: numbers(how.count + 1)?,
            tiles: device.allocate(tiles(how, tokens) * TILE_BYTES)?,
            given: match shared {
                Some(routes) => routes.given.clone(),
                None => device.allocate(all * decoder.config.hidden * decoder.size())?,
            },
        }))
    }

    /// By the router's logits in `scores`, which become these.
    fn choose(&self, device: &Device, mixture: &Mixture, count: usize) -> Result<()> {
        let how = mixture.how;
        let rows = (count * how.used) as i32;
        device.launch(
            "route",
            Launch::row(count.div_ceil(8), THREADS),
            args![
                &self.scores,
                mixture.selection.as_ref(),
                &self.chosen,
                &self.worth,
                &self.places,
                &self.weights,
                count as i32,
                Routing::of(how),
            ],
        )?;
        let by_experts = Launch::row(how.count, THREADS);
        device.launch(
            "count_rows",
            by_experts,
            args![&self.chosen, &self.counts, rows],
        )?;
        device.launch(
            "place_rows",
            by_experts,
            args![
                &self.chosen,
                &self.worth,
                mixture.factors.as_ref(),
                &self.counts,
                &self.starts,
                &self.places,
                &self.tokens,
                &self.weights,
                &self.tiles,
                rows,
                how.used as i32,
                how.each() as i32,
                tiles(how, count) as i32,
            ],
        )
    }
}

/// Tiles that cover all rows, however they are shared out.
fn tiles(how: Experts, tokens: usize) -> usize {
    let rows = tokens * how.used;
    rows / TILE + how.count.min(rows)
}

/// Rows of a matrix on the device, and which of them is wanted for each row of the experts (none: they are those).
type Rows<'a> = (Address, Option<&'a Buffer>);

/// A mixture at work on so many tokens.
struct AtWork<'a> {
    decoder: &'a Decoder,
    mixture: &'a Mixture,
    routes: &'a Routes,
    count: usize,
}

impl<'a> AtWork<'a> {
    fn new(decoder: &'a Decoder, mixture: &'a Mixture, count: usize, pass: &'a Pass) -> Self {
        Self {
            decoder,
            mixture,
            routes: pass.routes.as_ref().expect("made with the pass"),
            count,
        }
    }

    fn rows(&self) -> usize {
        self.count * self.mixture.how.used
    }

    /// The inner width of the experts that are chosen among.
    fn ffn(&self) -> usize {
        self.mixture.down.cols
    }

    /// The part of `buffer` that the expert for all tokens has, or the MLP beside them, whose rows are so wide there; `others` is
    /// how wide those of the others are.
    fn shared(&self, buffer: &Buffer, others: usize, width: usize) -> Buffer {
        let (first, len) = (self.rows() * others, self.count * width);
        buffer.part(first, len, self.decoder.size())
    }

    /// y = x·Wᵀ + share·b for all rows, each with its expert's W and b, where there are biases.
    fn by_rows(
        &self,
        (place, biases): (Place, &Option<Buffer>),
        x: Rows,
        y: &Buffer,
        share: f32,
    ) -> Result<()> {
        let biases = (biases.as_ref(), share);
        self.product(
            "expert_rows",
            place,
            (place.rows, place.cols),
            x,
            (y, biases),
        )
    }

    /// y = x·W.
    fn by_columns(&self, place: Place, x: Rows, y: &Buffer) -> Result<()> {
        let none = (None, 0.0);
        self.product(
            "expert_columns",
            place,
            (place.cols, place.rows),
            x,
            (y, none),
        )
    }

    fn product(
        &self,
        stem: &str,
        place: Place,
        (n, k): (usize, usize),
        (x, tokens): Rows,
        (y, (biases, share)): (&Buffer, (Option<&Buffer>, f32)),
    ) -> Result<()> {
        let tiles = tiles(self.mixture.how, self.count);
        self.decoder.device.launch(
            &self.decoder.kernels.of_format(stem),
            Launch::plane(n.div_ceil(TILE), tiles, THREADS).shared(SHARED),
            args![
                x,
                tokens,
                self.mixture
                    .weights
                    .element(place.first, self.decoder.size()),
                place.stride as u64,
                &self.routes.tiles,
                biases,
                share,
                y,
                n as i32,
                k as i32,
            ],
        )
    }

    /// Adds Σ dyᵀ·x over the rows of each expert to the gradient of its matrix; `at` is the first expert's.
    fn gradient(&self, place: Place, dy: Rows, x: Rows, at: Option<Address>) -> Result<()> {
        let Some(at) = at else {
            return Ok(());
        };
        let (m, n) = (place.rows, place.cols);
        let launch = Launch::plane(n.div_ceil(TILE), m.div_ceil(TILE), THREADS);
        self.decoder.device.launch(
            &self.decoder.kernels.of_format("expert_gradient"),
            launch.deep(self.mixture.how.count).shared(SHARED),
            args![
                dy.0,
                dy.1,
                x.0,
                x.1,
                &self.routes.starts,
                at,
                place.stride as u64,
                m as i32,
                n as i32,
            ],
        )
    }

    /// What rows' weights gain, since biases count with their rows; `dy` is the gradient of what experts give.
    fn bias_weights(&self, biases: &Buffer, dy: Address, d_weights: &Buffer) -> Result<()> {
        let decoder = self.decoder;
        decoder.device.launch(
            &decoder.kernels.of_format("expert_bias_weights"),
            Launch::row(tiles(self.mixture.how, self.count), THREADS),
            args![
                dy,
                &self.routes.tokens,
                biases,
                &self.routes.tiles,
                d_weights,
                decoder.config.hidden as i32,
            ],
        )
    }

    /// Adds Σ dy over the rows of each expert, times their weights, to the gradient of its bias of a matrix; `at` is the first
    /// expert's.
    fn bias_gradient(
        &self,
        place: Place,
        (dy, tokens): Rows,
        weights: Option<&Buffer>,
        at: Option<Address>,
    ) -> Result<()> {
        let Some(at) = at else {
            return Ok(());
        };
        let decoder = self.decoder;
        decoder.device.launch(
            &decoder.kernels.of_format("expert_bias_gradient"),
            Launch::plane(
                place.rows.div_ceil(THREADS),
                self.mixture.how.count,
                THREADS,
            ),
            args![
                dy,
                tokens,
                weights,
                &self.routes.starts,
                at,
                place.rows as i32,
            ],
        )
    }

    /// What the experts' rows gave, brought together for each token: `y` is set to it times `scale`, or gains it.
    fn mix(
        &self,
        weights: Option<&Buffer>,
        (y, format): (Address, Precision),
        scale: f32,
        keep: bool,
    ) -> Result<()> {
        let stem = self.decoder.kernels.of_format("mix");
        self.decoder.device.launch(
            &format!("{stem}_{}", format.name()),
            Launch::row(self.count, THREADS),
            args![
                &self.routes.given,
                &self.routes.places,
                weights,
                y,
                self.decoder.config.hidden as i32,
                self.mixture.how.each() as i32,
                scale,
                i32::from(keep),
            ],
        )
    }
}

impl Decoder {
    /// `pass.x`, normed, goes to its experts: `pass.routes`, and `pass.gate_up` of their rows.
    pub(super) fn send_to_experts(
        &self,
        norms: &LayerNorms<Buffer>,
        mixture: &Mixture,
        count: usize,
        pass: &Pass,
    ) -> Result<()> {
        let work = AtWork::new(self, mixture, count, pass);
        let read = |norm: &Option<Buffer>| self.read(&pass.x, norm.as_ref(), count, &pass.normed);
        read(norms.of_router())?; // and so do experts, where they are not apart
        let logits = (work.routes.scores).rows(0, mixture.how.outputs(), Precision::F32);
        self.multiply(
            &mixture.router,
            (&pass.normed, 1.0),
            logits,
            count,
            0.0,
            pass,
        )?;
        if let Some(bias) = &mixture.router.bias {
            let scores = &work.routes.scores;
            self.bias("add_bias_f32", scores, bias, count, mixture.how.outputs())?;
        }
        work.routes.choose(&self.device, mixture, count)?;
        if mixture.how.apart {
            read(&norms.before_mlp)?;
        }
        if let Some(mlp) = &mixture.shared {
            let gate_up = work.shared(&pass.gate_up, 2 * work.ffn(), mlp.gate_up.rows);
            self.product(&mlp.gate_up, &pass.normed, &gate_up, count, pass)?;
        }
        if mixture.how.apart {
            read(norms.of_experts())?;
        }
        let read = (pass.normed.address(), Some(&work.routes.tokens));
        let gate_up = (mixture.gate_up, &mixture.gate_up_bias);
        work.by_rows(gate_up, read, &pass.gate_up, 1.0)
    }

    /// From `pass.gate_up` of the experts' rows to `pass.inner`.
    pub(super) fn experts_inner(&self, mixture: &Mixture, count: usize, pass: &Pass) -> Result<()> {
        let work = AtWork::new(self, mixture, count, pass);
        self.inner((&pass.gate_up, &pass.inner), work.rows(), work.ffn())?;
        let Some(mlp) = &mixture.shared else {
            return Ok(());
        };
        let gate_up = work.shared(&pass.gate_up, 2 * work.ffn(), mlp.gate_up.rows);
        let inner = work.shared(&pass.inner, work.ffn(), mlp.down.cols);
        self.inner((&gate_up, &inner), count, mlp.down.cols)
    }

    /// From `pass.inner` of the experts' rows to their mixture times `scale`: `pass.down`, where there is a norm after it; else the
    /// residual stream `x` gains it.
    pub(super) fn mix_experts(
        &self,
        norms: &LayerNorms<Buffer>,
        mixture: &Mixture,
        count: usize,
        pass: &Pass,
        (x, scale): (&Buffer, f32),
    ) -> Result<()> {
        let work = AtWork::new(self, mixture, count, pass);
        let read = (pass.inner.address(), None);
        let down = (mixture.down, &mixture.down_bias);
        work.by_rows(down, read, &work.routes.given, 1.0 / scale)?;
        let weights = Some(&work.routes.weights);
        if let (Some(apart), Some(norm), Some(mlp), Some(down)) =
            (&pass.apart, &norms.after_one, &mixture.shared, &pass.down)
        {
            let inner = work.shared(&pass.inner, work.ffn(), mlp.down.cols);
            let of_one = Some(&apart.of_one);
            self.give(&mlp.down, (&inner, scale), of_one, x, count, pass)?;
            self.norm_by("rms_norm_f32", (&apart.of_one, None), norm, count, down)?;
            let to = (apart.of_experts.address(), Precision::F32);
            work.mix(weights, to, scale, false)?;
            return self.gain(&norms.after_experts, Some(&apart.of_experts), down, count);
        }
        if let Some(mlp) = &mixture.shared {
            let inner = work.shared(&pass.inner, work.ffn(), mlp.down.cols);
            let given = work.shared(&work.routes.given, mlp.down.rows, mlp.down.rows);
            self.product(&mlp.down, &inner, &given, count, pass)?;
        }
        let to = pass.down.as_ref().unwrap_or(x).address();
        work.mix(weights, (to, Precision::F32), scale, pass.down.is_none())
    }
}

/// What an MLP and the experts that it is beside give, each before its norm, `[T, hidden]`, float32.
#[derive(Clone)]
pub struct Apart {
    of_one: Buffer,
    of_experts: Buffer,
}

impl Apart {
    /// Its bytes for each token, where both are kept.
    pub fn bytes(config: &Config) -> usize {
        let apart = config.mixture().is_some_and(|how| how.apart);
        usize::from(apart) * 2 * config.hidden * size_of::<f32>()
    }

    /// Room for those of so many tokens; where they are not `kept`, one has the other's, which is done with by then.
    pub fn new(decoder: &Decoder, tokens: usize, kept: bool) -> Result<Option<Self>> {
        let each = tokens * Self::bytes(&decoder.config) / 2;
        if each == 0 {
            return Ok(None);
        }
        let of_one = decoder.device.allocate(each)?;
        Ok(Some(Self {
            of_experts: match kept {
                true => decoder.device.allocate(each)?,
                false => of_one.clone(),
            },
            of_one,
        }))
    }
}

/// What the way back through a mixture has on its way.
pub(super) struct OnTheWay {
    /// Of each row's weight, `[T · each]`, float32.
    d_weights: Buffer,
    /// Of the router's logits, `[T, outputs]`,
    d_logits: Buffer,
    /// of what experts read, `[T, hidden]`, in the decoder's format,
    d_read: Buffer,
    /// and, where an MLP is beside them, of the sum of what both give, `[T, hidden]`, float32.
    d_sum: Option<Buffer>,
}

impl OnTheWay {
    /// The bytes that it takes for each token.
    pub fn bytes(config: &Config, precision: Precision) -> usize {
        config.mixture().map_or(0, |how| {
            how.each() * size_of::<f32>()
                + (how.outputs() + config.hidden) * bytes_of(precision)
                + Apart::bytes(config) / 2
        })
    }

    pub fn new(decoder: &Decoder, tokens: usize) -> Result<Option<Self>> {
        let Some(how) = decoder.config.mixture() else {
            return Ok(None);
        };
        let rows = |width: usize, size: usize| decoder.device.allocate(tokens * width * size);
        Ok(Some(Self {
            d_weights: rows(how.each(), size_of::<f32>())?,
            d_logits: rows(how.outputs(), decoder.size())?,
            d_read: rows(decoder.config.hidden, decoder.size())?,
            d_sum: (how.apart)
                .then(|| rows(decoder.config.hidden, size_of::<f32>()))
                .transpose()?,
        }))
    }
}

impl Backward<'_> {
    /// next = middle + norm(mixture(norm(middle))), or that of its sum with what an MLP beside it gives, each normed before.
    /// `pass.gate_up` becomes its gradient.
    pub(super) fn mixture(&self, i: usize, mixture: &Mixture, pass: &Pass) -> Result<()> {
        let (decoder, places) = (self.decoder, &self.gradients.params.layers[i]);
        let (norms, spans) = (&decoder.layers[i].norms, &places.norms);
        let (hidden, kind) = (decoder.config.hidden, decoder.config.norm());
        let rows = self.shape.tokens;
        let own = self.experts.as_ref().expect("made for a mixture");
        let (Some(apart), Some(d_sum), Some(down), Some(d_given)) =
            (&pass.apart, &own.d_sum, &pass.down, &self.d_given)
        else {
            let norm = (norms.after_mlp.as_ref(), spans.after_mlp.as_ref());
            let dy = self.given(norm, kind, pass.down.as_ref())?;
            return self.experts(i, mixture, dy, pass);
        };
        let sum = d_sum.rows(0, hidden, Precision::F32);
        let dy = self.operand(d_given, hidden);
        let norm = norm_at(&norms.after_mlp, &spans.after_mlp);
        self.norm_given(norm, kind, (down, &self.dx), sum, rows)?;
        let norm = norm_at(&norms.after_one, &spans.after_one);
        self.norm_given(norm, kind, (&apart.of_one, d_sum), dy, rows)?;
        self.beside(i, mixture, dy, pass)?;
        let norm = norm_at(&norms.after_experts, &spans.after_experts);
        self.norm_given(norm, kind, (&apart.of_experts, d_sum), dy, rows)?;
        self.experts(i, mixture, dy, pass)
    }

    /// The MLP beside experts alone, given the gradient of what it gave.
    fn beside(&self, i: usize, mixture: &Mixture, dy: Operand, pass: &Pass) -> Result<()> {
        let work = AtWork::new(self.decoder, mixture, self.shape.tokens, pass);
        let mlp = mixture.shared.as_ref();
        let mlp = mlp.zip(self.gradients.params.layers[i].beside.as_ref());
        let (mlp, places) = mlp.expect("it is beside them");
        let gate_up = work.shared(&pass.gate_up, 2 * work.ffn(), mlp.gate_up.rows);
        let inner = work.shared(&pass.inner, work.ffn(), mlp.down.cols);
        self.one_mlp(i, (mlp, places), (&gate_up, &inner), dy, pass)
    }

    /// Experts alone, with the one that all tokens go to, given the gradient of what they gave.
    fn experts(&self, i: usize, mixture: &Mixture, dy: Operand, pass: &Pass) -> Result<()> {
        let (decoder, count) = (self.decoder, self.shape.tokens);
        let (layer, places) = (&decoder.layers[i], &self.gradients.params.layers[i]);
        let work = AtWork::new(decoder, mixture, count, pass);
        let own = self.experts.as_ref().expect("made for a mixture");
        let tokens = Some(&work.routes.tokens);
        let (inner, gate_up) = (pass.inner.address(), pass.gate_up.address());
        let wanted = |span: &Span| self.gradients.span(span);
        work.by_columns(mixture.down, (dy.at, tokens), &pass.inner)?;
        let weights = (&work.routes.weights, &own.d_weights);
        let rows = (&pass.gate_up, &pass.inner);
        self.experts_activation(rows, work.rows(), work.ffn(), weights)?;
        let (first, read) = (places.mlp(), pass.normed.address());
        let at = wanted(&first.down.weight);
        work.gradient(mixture.down, (dy.at, tokens), (inner, None), at)?;
        if let (Some(biases), Some(span)) = (&mixture.down_bias, &first.down.bias) {
            work.bias_weights(biases, dy.at, &own.d_weights)?;
            let weights = Some(&work.routes.weights);
            work.bias_gradient(mixture.down, (dy.at, tokens), weights, wanted(span))?;
        }
        let norm = layer.norms.of_experts().as_ref();
        let span = places.norms.of_experts().as_ref();
        decoder.read(&pass.x, norm, count, &pass.normed)?;
        let at = wanted(&first.gate_up.weight);
        work.gradient(mixture.gate_up, (gate_up, None), (read, tokens), at)?;
        let at = first.gate_up.bias.as_ref().and_then(wanted);
        work.bias_gradient(mixture.gate_up, (gate_up, None), None, at)?;
        work.by_columns(mixture.gate_up, (gate_up, None), &work.routes.given)?;
        if let Some(mlp) = &mixture.shared
            && !mixture.how.apart
        {
            self.shared_expert(i, mlp, &work, dy, pass)?;
        }
        let (to, keep) = match norm {
            Some(_) => (self.operand(&own.d_read, decoder.config.hidden), false),
            None => (self.dx.rows(0, decoder.config.hidden, Precision::F32), true),
        };
        work.mix(None, (to.at, to.precision), 1.0, keep)?;
        if let (Some(weight), Some(span)) = (norm, span) {
            let norm = Norm {
                x: &pass.x,
                rows: None,
                count,
                weight,
                span,
                dy: &own.d_read,
            };
            self.norm(&norm, &self.dx, self.dx_copy.as_ref(), true)?;
        }
        self.router(i, &work, own, pass)
    }

    /// From the gradient of what MLPs give, in `inner`, to that of `gate_up`, of rows that count by `weights`, which gain theirs;
    /// `inner` becomes what was read by output projections.
    fn experts_activation(
        &self,
        (gate_up, inner): (&Buffer, &Buffer),
        rows: usize,
        ffn: usize,
        (weights, d_weights): (&Buffer, &Buffer),
    ) -> Result<()> {
        let decoder = self.decoder;
        decoder.device.launch(
            &decoder.kernels.of_format("expert_activation_backward"),
            Launch::row(rows, THREADS),
            args![
                gate_up,
                inner,
                weights,
                d_weights,
                ffn as i32,
                decoder.curve()
            ],
        )
    }

    /// The same for the expert that all tokens go to, the last of the layer's: its part of what it reads is left in the routes.
    fn shared_expert(
        &self,
        i: usize,
        mlp: &OneMlp,
        work: &AtWork,
        dy: Operand,
        pass: &Pass,
    ) -> Result<()> {
        let own = self.experts.as_ref().expect("made for a mixture");
        let places = self.gradients.params.layers[i].mlps.last();
        let places = places.expect("it is the last");
        let gate_up = work.shared(&pass.gate_up, 2 * work.ffn(), mlp.gate_up.rows);
        let inner = work.shared(&pass.inner, work.ffn(), mlp.down.cols);
        let of_rows = |buffer: &Buffer| buffer.part(work.rows(), work.count, size_of::<f32>());
        let weights = (&of_rows(&work.routes.weights), &of_rows(&own.d_weights));
        self.input_gradient(&mlp.down, dy, &inner, pass)?;
        self.experts_activation((&gate_up, &inner), work.count, mlp.down.cols, weights)?;
        self.weight_gradient(&mlp.down, &places.down, &inner, dy, pass)?;
        let d_gate_up = self.operand(&gate_up, mlp.gate_up.rows);
        let gate_up = (&mlp.gate_up, &places.gate_up);
        self.weight_gradient(gate_up.0, gate_up.1, &pass.normed, d_gate_up, pass)?;
        let given = work.shared(&work.routes.given, mlp.down.rows, mlp.down.rows);
        self.input_gradient(&mlp.gate_up, d_gate_up, &given, pass)
    }

    /// Back through the router, given the gradient of each row's weight.
    fn router(&self, i: usize, work: &AtWork, own: &OnTheWay, pass: &Pass) -> Result<()> {
        let (decoder, routes, how) = (self.decoder, work.routes, work.mixture.how);
        let (layer, places) = (&decoder.layers[i], &self.gradients.params.layers[i]);
        decoder.device.launch(
            &decoder.kernels.of_format("route_backward"),
            Launch::row(work.count.div_ceil(8), THREADS),
            args![
                &routes.scores,
                &routes.chosen,
                &routes.places,
                &routes.weights,
                &own.d_weights,
                &own.d_logits,
                work.count as i32,
                Routing::of(how),
            ],
        )?;
        let to = places.factors.as_ref();
        if let Some(to) = to.and_then(|span| self.gradients.span(span)) {
            decoder.device.launch(
                "factor_gradient",
                Launch::row(how.count, THREADS),
                args![
                    &routes.chosen,
                    &routes.worth,
                    &routes.places,
                    &own.d_weights,
                    to,
                    work.rows() as i32,
                    how.used as i32,
                    how.each() as i32,
                ],
            )?;
        }
        let place = places.router.as_ref().expect("experts have a router");
        let d_logits = self.operand(&own.d_logits, how.outputs());
        self.read(
            &[(&work.mixture.router, place, d_logits)],
            (layer.norms.of_router(), places.norms.of_router()),
            &pass.x,
            pass,
        )?;
        self.bias_gradient(place, &own.d_logits, decoder.precision)
    }
}
