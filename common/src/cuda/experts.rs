//! Mixtures of experts on the device, forward and back: as `model/experts.rs`, but who goes where stays on the device, so that
//! a step with experts is a graph like any other, and all experts' rows are one product.

use super::args;
use super::backward::{Backward, Norm};
use super::decoder::{Decoder, Linear};
use super::device::{Address, Buffer, Device, Launch, Operand, Precision, bytes_of};
use super::launches::THREADS;
use super::pass::Pass;
use crate::model::{LayerParams, Span};
use crate::weights::{Config, Experts, Scores};
use anyhow::{Result, ensure};

/// `EXPERT_TILE`, `MOST_EXPERTS` and `EXPERT_SHARED` of `common/cuda/kernels.h`, and the bytes of an `ExpertTile`.
const TILE: usize = 128;
const MOST: usize = 512;
const SHARED: usize = 81_920;
const TILE_BYTES: usize = 3 * size_of::<i32>();

/// Rows that the MLPs of a layer have for each token.
pub(super) fn rows_each(config: &Config) -> usize {
    config.mixture().map_or(1, |how| how.used)
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
    ensure!(
        config.hidden.is_multiple_of(8) && how.ffn.is_multiple_of(8),
        "experts of {} x {} are no multiples of 8, as the GPU's kernels want them: use --device cpu",
        config.hidden,
        how.ffn
    );
    let plain =
        how.scores == Scores::Softmax && how.shared.is_none() && !how.biased && how.scale == 1.0;
    ensure!(
        plain && !config.experts.contains(&None),
        "{}: a GPU takes no such mixtures of experts yet: use --device cpu",
        config.model_type
    );
    Ok(())
}

/// The experts of a layer, and what chooses among them.
pub(super) struct Mixture {
    how: Experts,
    router: Linear,
    /// Expert after expert: `[gate | up]`, then the output projection.
    weights: Buffer,
    gate_up: Place,
    down: Place,
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
    /// `weights` are those of [`all_experts`], in the decoder's format.
    pub fn new(how: Experts, router: Linear, weights: Buffer, params: &LayerParams) -> Self {
        let mlp = params.mlp();
        let (gate_up, down) = (&mlp.gate_up, &mlp.down);
        let stride = gate_up.weight.range.len() + down.weight.range.len();
        Self {
            how,
            router,
            weights,
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
        }
    }
}

/// The parameters of all experts of a layer, which follow each other.
pub(super) fn all_experts(params: &LayerParams) -> Span {
    let matrices = params.mlps.iter().flat_map(|mlp| [&mlp.gate_up, &mlp.down]);
    let mut spans = matrices.map(|matrix| &matrix.weight);
    let mut all = spans.next().expect("there are experts").clone();
    for span in spans {
        assert_eq!(all.range.end, span.range.start);
        all.range.end = span.range.end;
        all.tensors.extend_from_slice(&span.tensors);
    }
    all
}

/// Which tokens went to which experts, as the kernels have it; a row is a token at one of its experts.
#[derive(Clone)]
pub struct Routes {
    /// The router's soft-max, `[T, experts]`, float32.
    shares: Buffer,
    /// `[T, used]`
    chosen: Buffer,
    worth: Buffer,
    places: Buffer,
    /// `[rows]`
    tokens: Buffer,
    weights: Buffer,
    /// `[experts]`, and one more
    counts: Buffer,
    starts: Buffer,
    tiles: Buffer,
    /// What the experts give, `[rows, hidden]`, in the decoder's format; done with when they are mixed.
    given: Buffer,
}

impl Routes {
    /// The bytes that they take for each token, and those of what the experts give.
    pub fn bytes(config: &Config, precision: Precision) -> (usize, usize) {
        let Some(how) = config.mixture() else {
            return (0, 0);
        };
        let numbers = how.count + 5 * how.used;
        let given = how.used * config.hidden * bytes_of(precision);
        (numbers * size_of::<i32>(), given)
    }

    /// Room for those of so many tokens; with `shared`, what the experts give has its room there.
    pub fn new(decoder: &Decoder, tokens: usize, shared: Option<&Self>) -> Result<Option<Self>> {
        let Some(how) = decoder.config.mixture() else {
            return Ok(None);
        };
        let device = &decoder.device;
        let numbers = |count: usize| device.allocate(count * size_of::<i32>());
        let rows = tokens * how.used;
        Ok(Some(Self {
            shares: numbers(tokens * how.count)?,
            chosen: numbers(rows)?,
            worth: numbers(rows)?,
            places: numbers(rows)?,
            tokens: numbers(rows)?,
            weights: numbers(rows)?,
            counts: numbers(how.count)?,
            starts: numbers(how.count + 1)?,
            tiles: device.allocate(tiles(how, tokens) * TILE_BYTES)?,
            given: match shared {
                Some(routes) => routes.given.clone(),
                None => device.allocate(rows * decoder.config.hidden * decoder.size())?,
            },
        }))
    }

    /// By the router's logits in `shares`, which become their soft-max.
    fn choose(&self, device: &Device, how: Experts, count: usize) -> Result<()> {
        let rows = (count * how.used) as i32;
        let [experts, used] = [how.count, how.used].map(|n| n as i32);
        device.launch(
            "route",
            Launch::row(count.div_ceil(8), THREADS),
            args![
                &self.shares,
                &self.chosen,
                &self.worth,
                count as i32,
                experts,
                used,
                i32::from(how.normed.is_some()),
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
                &self.counts,
                &self.starts,
                &self.places,
                &self.tokens,
                &self.weights,
                &self.tiles,
                rows,
                used,
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

    /// y = x·Wᵀ for all rows, each with its expert's W.
    fn by_rows(&self, place: Place, x: Rows, y: &Buffer) -> Result<()> {
        self.product("expert_rows", place, (place.rows, place.cols), x, y)
    }

    /// y = x·W.
    fn by_columns(&self, place: Place, x: Rows, y: &Buffer) -> Result<()> {
        self.product("expert_columns", place, (place.cols, place.rows), x, y)
    }

    fn product(
        &self,
        stem: &str,
        place: Place,
        (n, k): (usize, usize),
        (x, tokens): Rows,
        y: &Buffer,
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
                self.mixture.how.used as i32,
                scale,
                i32::from(keep),
            ],
        )
    }
}

impl Decoder {
    /// What `pass.normed` has goes to its experts: `pass.routes`, and `pass.gate_up` of their rows.
    pub(super) fn send_to_experts(
        &self,
        mixture: &Mixture,
        count: usize,
        pass: &Pass,
    ) -> Result<()> {
        let work = AtWork::new(self, mixture, count, pass);
        let logits = (work.routes.shares).rows(0, mixture.how.count, Precision::F32);
        self.multiply(
            &mixture.router,
            (&pass.normed, 1.0),
            logits,
            count,
            0.0,
            pass,
        )?;
        work.routes.choose(&self.device, mixture.how, count)?;
        let read = (pass.normed.address(), Some(&work.routes.tokens));
        work.by_rows(mixture.gate_up, read, &pass.gate_up)
    }

    /// From `pass.inner` of the experts' rows to their mixture times `scale`: `pass.down`, where there is a norm after it; else the
    /// residual stream `x` gains it.
    pub(super) fn mix_experts(
        &self,
        mixture: &Mixture,
        count: usize,
        pass: &Pass,
        (x, scale): (&Buffer, f32),
    ) -> Result<()> {
        let work = AtWork::new(self, mixture, count, pass);
        work.by_rows(
            mixture.down,
            (pass.inner.address(), None),
            &work.routes.given,
        )?;
        let to = pass.down.as_ref().unwrap_or(x).address();
        let weights = Some(&work.routes.weights);
        work.mix(weights, (to, Precision::F32), scale, pass.down.is_none())
    }
}

/// What the way back through a mixture has on its way.
pub(super) struct OnTheWay {
    /// Of each row's weight, `[rows]`, float32.
    d_weights: Buffer,
    /// Of the router's logits, `[T, experts]`,
    d_logits: Buffer,
    /// and of what router and experts read, `[T, hidden]`, in the decoder's format.
    d_read: Buffer,
}

impl OnTheWay {
    /// The bytes that it takes for each token.
    pub fn bytes(config: &Config, precision: Precision) -> usize {
        config.mixture().map_or(0, |how| {
            how.used * size_of::<f32>() + (how.count + config.hidden) * bytes_of(precision)
        })
    }

    pub fn new(decoder: &Decoder, tokens: usize) -> Result<Option<Self>> {
        let Some(how) = decoder.config.mixture() else {
            return Ok(None);
        };
        let rows = |width: usize, size: usize| decoder.device.allocate(tokens * width * size);
        Ok(Some(Self {
            d_weights: rows(how.used, size_of::<f32>())?,
            d_logits: rows(how.count, decoder.size())?,
            d_read: rows(decoder.config.hidden, decoder.size())?,
        }))
    }
}

impl Backward<'_> {
    /// next = middle + norm(mixture(norm(middle))), given the gradient `dy` of what the mixture gave. `pass.gate_up` becomes its
    /// gradient.
    pub(super) fn experts(
        &self,
        i: usize,
        mixture: &Mixture,
        dy: Operand,
        pass: &Pass,
    ) -> Result<()> {
        let (decoder, count) = (self.decoder, self.shape.tokens);
        let (layer, places) = (&decoder.layers[i], &self.gradients.params.layers[i]);
        let work = AtWork::new(decoder, mixture, count, pass);
        let own = self.experts.as_ref().expect("made for a mixture");
        let tokens = Some(&work.routes.tokens);
        let (inner, gate_up) = (pass.inner.address(), pass.gate_up.address());
        let wanted = |span: &Span| self.gradients.span(span);
        work.by_columns(mixture.down, (dy.at, tokens), &pass.inner)?;
        let (ffn, [c, a]) = (decoder.config.ffn as i32, decoder.config.activation.curve());
        decoder.device.launch(
            &decoder.kernels.of_format("expert_activation_backward"),
            Launch::row(work.rows(), THREADS),
            args![
                &pass.gate_up,
                &pass.inner,
                &work.routes.weights,
                &own.d_weights,
                ffn,
                c,
                a
            ],
        )?;
        let (first, read) = (places.mlp(), pass.normed.address());
        let at = wanted(&first.down.weight);
        work.gradient(mixture.down, (dy.at, tokens), (inner, None), at)?;
        let norm = layer.norms.before_mlp.as_ref();
        decoder.read(&pass.x, norm, count, &pass.normed)?;
        let at = wanted(&first.gate_up.weight);
        work.gradient(mixture.gate_up, (gate_up, None), (read, tokens), at)?;
        work.by_columns(mixture.gate_up, (gate_up, None), &work.routes.given)?;
        self.router(i, &work, own, pass)
    }

    /// Back through the router and what it reads as the experts do, whose rows' part is in the routes.
    fn router(&self, i: usize, work: &AtWork, own: &OnTheWay, pass: &Pass) -> Result<()> {
        let (decoder, routes, how) = (self.decoder, work.routes, work.mixture.how);
        let (layer, places) = (&decoder.layers[i], &self.gradients.params.layers[i]);
        decoder.device.launch(
            &decoder.kernels.of_format("route_backward"),
            Launch::row(work.count.div_ceil(8), THREADS),
            args![
                &routes.shares,
                &routes.chosen,
                &routes.places,
                &routes.weights,
                &own.d_weights,
                &own.d_logits,
                work.count as i32,
                how.count as i32,
                how.used as i32,
                i32::from(how.normed.is_some()),
            ],
        )?;
        let d_logits = self.operand(&own.d_logits, how.count);
        let (router, place) = (&work.mixture.router, places.router.as_ref());
        let place = place.expect("experts have a router");
        self.weight_gradient(router, place, &pass.normed, d_logits, pass)?;
        let norm = layer
            .norms
            .before_mlp
            .as_ref()
            .zip(places.norms.before_mlp.as_ref());
        let (to, keep) = match norm {
            Some(_) => (self.operand(&own.d_read, router.cols), 0.0),
            None => (self.dx.rows(0, router.cols, Precision::F32), 1.0),
        };
        self.add_input_gradient(router, d_logits, to, keep, pass)?;
        work.mix(None, (to.at, to.precision), 1.0, true)?;
        let Some((weight, span)) = norm else {
            return Ok(());
        };
        let norm = Norm {
            x: &pass.x,
            rows: None,
            count: work.count,
            weight,
            span,
            dy: &own.d_read,
        };
        self.norm(&norm, &self.dx, self.dx_copy.as_ref(), true)
    }
}
