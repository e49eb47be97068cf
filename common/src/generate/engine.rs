//! The loop of generation: prompts in, steps of all running sequences, finished groups out in order.

use super::cache::{LayerCache, Past, Shape};
use super::logits::{Logits, Row};
use super::queue::{Group, Queue};
use super::sampler::{Drawn, Sampling, draw, stream};
use super::step::{Step, Storage};
use crate::jsonl::FinishReason;
use crate::kernels::decoding::Format;
use crate::kernels::layout::Layout;
use crate::kernels::team;
use crate::model::{Aside, Decoder, LayerState, Memory, Rotations};
use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Fewer sequences than this are no share of their own: reading the weights would cost more than waiting.
const LEAST_SHARE: usize = 32;

/// Prompts run together up to so many tokens: more of them are no quicker, and would not stay in the caches.
const PROMPT_TOKENS: usize = 1024;

/// A prompt to answer.
#[derive(Clone, Debug)]
pub struct Request {
    /// What its random numbers are derived from, with the seed and the sample's number: the prompt's id.
    pub key: String,
    /// The rendered prompt.
    pub prompt: Vec<u32>,
    /// How many responses.
    pub k: usize,
}

/// A response.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its tokens, the end token included.
    pub token_ids: Vec<u32>,
    /// Why it ended: an end token or the caller's stop rule, or the limit on tokens or the end of the context.
    pub finish: FinishReason,
    /// Σ log p over its tokens under the model itself, nats.
    pub logp: f64,
}

/// How much runs at a time. What comes out does not depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences.
    pub sequences: usize,
    /// Memory for keys, values, linear attention and activations; a single sequence that needs more runs all the same, alone.
    pub bytes: usize,
}

/// What ends a response besides the model: sees its tokens after each draw.
pub type Stopped<'a> = &'a (dyn Fn(&[u32]) -> bool + Sync);

/// Something that answers many prompts at once, a step at a time.
pub trait Generate {
    /// Whether another prompt would find work to do now.
    fn wants_prompt(&self) -> bool;
    /// Whether nothing is left to do.
    fn is_idle(&self) -> bool;
    /// Tokens generated so far.
    fn tokens(&self) -> u64;
    /// Whether a prompt of so many tokens and one response to it fit into the memory.
    fn has_room_for(&self, prompt: usize) -> bool;
    /// Takes a prompt, of at least one token and shorter than the context. It is run when its first sample starts.
    fn push(&mut self, request: Request);
    /// Fills free slots, then draws one token for each running sequence. `stopped` may end a response by a rule of its
    /// own.
    ///
    /// # Errors
    /// A device that fails or has no room.
    fn step(&mut self, stopped: Stopped) -> Result<()>;
    /// The finished groups at the head of the line, each with its samples in order.
    fn finished(&mut self) -> Vec<(Request, Vec<Sample>)>;
}

/// Generates on the CPU.
pub struct Generator<'a> {
    decoder: &'a Decoder,
    how: Sampling,
    end_ids: Vec<u32>,
    limits: Limits,
    /// How keys and values are kept.
    cache: Format,
    rotations: Rotations,
    groups: Queue<Prefix>,
    running: Vec<Sequence>,
    tokens: u64,
    /// Of each share of a step.
    storage: Vec<Storage>,
}

/// What a prompt leaves behind: from the start of its first sample to the end of the last, else nothing.
#[derive(Default)]
pub(super) struct Prefix {
    /// Of every layer.
    pub past: Vec<Past>,
    /// The logits after it.
    first: Logits,
}

impl Prefix {
    /// Whether the prompt has run.
    fn is_ready(&self) -> bool {
        !self.past.is_empty()
    }
}

/// A response at work.
pub(super) struct Sequence {
    /// Its group's number since the beginning.
    pub group: usize,
    number: usize,
    rng: ChaCha8Rng,
    pub token_ids: Vec<u32>,
    logp: f64,
    /// Of every layer: keys and values of what it has read of its own, beside the prompt's.
    pub past: Vec<Past>,
}

impl<'a> Generator<'a> {
    /// Nothing to do yet.
    pub fn new(decoder: &'a Decoder, how: Sampling, end_ids: &[u32], limits: Limits) -> Self {
        let rotations = decoder.rotations(0);
        let end_ids = end_ids.to_vec();
        let sequences = limits.sequences.max(1);
        Self {
            decoder,
            how,
            end_ids,
            limits: Limits {
                sequences,
                ..limits
            },
            cache: Format::Float(decoder.precision),
            rotations,
            groups: Queue::new(),
            running: vec![],
            tokens: 0,
            storage: vec![],
        }
    }

    /// Keeps keys and values in another format than the decoder's products have.
    pub fn with_cache(self, cache: Format) -> Self {
        Self { cache, ..self }
    }

    /// Runs the prompt of a group, and in the same pass those that wait after it, where they leave room for as many
    /// samples as there are slots: the layers' weights are read once for all of them.
    fn prefill(&mut self, first: usize) {
        let together = self.run_together(first);
        let mut layout = Layout::default();
        let mut tokens = vec![];
        for &number in &together {
            let prompt = &self.groups.group(number).request.prompt;
            layout.push(prompt.len(), &[]);
            tokens.extend(prompt);
        }
        let mut prefixes: Vec<Prefix> = together.iter().map(|_| Prefix::default()).collect();
        let keep = |i: usize, state: &mut LayerState| {
            let parts = prefixes.iter_mut().zip(layout.segments());
            if let Some(recurrent) = self.decoder.recurrent(i) {
                let width = recurrent.kind().input_width();
                // (The heads are shared out there.)
                for (prefix, segment) in parts {
                    let raw =
                        &state.qkv_raw[segment.tokens.start * width..segment.tokens.end * width];
                    prefix.past.push(Past::Memory(recurrent.after(raw)));
                }
                return;
            }
            if self.decoder.keys_of(i) != i {
                parts.for_each(|(prefix, _)| prefix.past.push(Past::Lent));
                return;
            }
            let width = self.decoder.heads(i).qkv_width();
            team::items(parts.collect(), |_, (prefix, segment)| {
                let mut cache = LayerCache::new(self.shape(i), segment.tokens.len());
                (state.qkv.chunks_exact(width).skip(segment.tokens.start))
                    .take(segment.tokens.len())
                    .for_each(|row| cache.push(row));
                cache.close();
                prefix.past.push(Past::Keys(cache));
            });
        };
        let hidden = team::with(|| {
            self.decoder
                .forward(&layout, &tokens, &mut Aside::default(), keep)
        });
        let width = self.decoder.config.hidden;
        for ((number, mut prefix), segment) in
            together.into_iter().zip(prefixes).zip(layout.segments())
        {
            let last = &hidden[(segment.tokens.end - 1) * width..][..width];
            prefix.first.set(self.decoder, last, self.how.scale());
            self.groups.group_mut(number).own = prefix;
        }
    }

    /// A group whose prompt must run, and those after it that may with it.
    fn run_together(&self, first: usize) -> Vec<usize> {
        let prompt_of = |number| self.groups.group(number).request.prompt.len();
        let mut together = vec![first];
        let mut tokens = prompt_of(first);
        let mut held = self.taken() + self.prompt_bytes(tokens);
        let slots = self.limits.sequences - self.running.len();
        let mut longest = self.response_bytes(tokens);
        for number in self.groups.after(first) {
            tokens += prompt_of(number);
            held += self.prompt_bytes(prompt_of(number));
            longest = longest.max(self.response_bytes(prompt_of(number)));
            let needed =
                held + slots * longest + Decoder::forward_bytes(&self.decoder.config, tokens);
            if tokens > PROMPT_TOKENS || needed > self.limits.bytes {
                break;
            }
            together.push(number);
        }
        together
    }

    /// Starts waiting samples in the free slots; each draws its first token from its prompt's logits.
    fn fill(&mut self, stopped: Stopped) {
        while let Some(number) = self.groups.next() {
            if !self.running.is_empty() && !self.has_room_to_start(number) {
                return;
            }
            if !self.groups.group(number).own.is_ready() {
                self.prefill(number);
            }
            let sample = self.groups.start(number);
            let Group { request, own, .. } = self.groups.group(number);
            let longest = self.longest(request.prompt.len());
            let past = |(i, prompt): (usize, &Past)| match prompt {
                Past::Keys(_) => Past::Keys(LayerCache::new(self.shape(i), longest)),
                Past::Memory(memory) => Past::Memory(memory.clone()),
                Past::Lent => Past::Lent,
            };
            let mut sequence = Sequence {
                group: number,
                number: sample,
                rng: stream(self.how.seed, &request.key, sample),
                token_ids: vec![],
                logp: 0.0,
                past: own.past.iter().enumerate().map(past).collect(),
            };
            sequence.draw(own.first.row(0), &request.prompt, &self.how);
            self.tokens += 1;
            match self.ended(&sequence, stopped) {
                Some(finish) => self.retire(sequence, finish),
                None => self.running.push(sequence),
            }
        }
    }

    /// What the running samples may come to hold, and the prompts that ran.
    fn taken(&self) -> usize {
        let prompt_of = |group: &Group<Prefix>| group.request.prompt.len();
        let running = self.running.iter().map(|s| self.groups.group(s.group));
        let running = running.map(|group| self.response_bytes(prompt_of(group)));
        let prompts = self.groups.iter().filter(|group| group.own.is_ready());
        let prompts = prompts.map(|group| self.prompt_bytes(prompt_of(group)));
        running.sum::<usize>() + prompts.sum::<usize>()
    }

    /// Whether a sample of a group may start beside what is running.
    fn has_room_to_start(&self, group: usize) -> bool {
        let group = self.groups.group(group);
        let prompt = group.request.prompt.len();
        let prefill = match group.own.is_ready() {
            false => {
                self.prompt_bytes(prompt) + Decoder::forward_bytes(&self.decoder.config, prompt)
            }
            true => 0,
        };
        self.running.len() < self.limits.sequences
            && self.taken() + prefill + self.response_bytes(prompt) <= self.limits.bytes
    }

    /// What a prompt holds while it is at work: its past and logits.
    fn prompt_bytes(&self, prompt: usize) -> usize {
        self.past_bytes(prompt) + self.decoder.config.vocab * size_of::<f32>()
    }

    /// What a response to a prompt may come to hold: its past and logits.
    fn response_bytes(&self, prompt: usize) -> usize {
        self.past_bytes(self.longest(prompt)) + self.decoder.config.vocab * size_of::<f32>()
    }

    /// The tokens of the longest response to a prompt.
    fn longest(&self, prompt: usize) -> usize {
        (self.decoder.config.context.saturating_sub(prompt)).min(self.how.max_tokens)
    }

    /// Of a layer's caches.
    fn shape(&self, layer: usize) -> Shape {
        Shape {
            heads: self.decoder.heads(layer),
            format: self.cache,
        }
    }

    fn past_bytes(&self, tokens: usize) -> usize {
        let layers = 0..self.decoder.config.layers;
        let bytes = |i: usize| match self.decoder.recurrent(i) {
            None if self.decoder.keys_of(i) != i => 0,
            None => LayerCache::bytes(self.shape(i), tokens),
            Some(recurrent) => Memory::bytes(recurrent.kind()),
        };
        layers.map(bytes).sum()
    }

    fn ended(&self, sequence: &Sequence, stopped: Stopped) -> Option<FinishReason> {
        let last = sequence.token_ids.last().expect("a token was drawn");
        let prompt = &self.groups.group(sequence.group).request.prompt;
        let length = prompt.len() + sequence.token_ids.len();
        if self.end_ids.contains(last) || stopped(&sequence.token_ids) {
            Some(FinishReason::Stop)
        } else if sequence.token_ids.len() >= self.how.max_tokens
            || length >= self.decoder.config.context
        {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    fn retire(&mut self, sequence: Sequence, finish: FinishReason) {
        let sample = Sample {
            token_ids: sequence.token_ids,
            finish,
            logp: sequence.logp,
        };
        if (self.groups).finish(sequence.group, sequence.number, sample) {
            self.groups.group_mut(sequence.group).own = Prefix::default();
        }
    }
}

impl Generate for Generator<'_> {
    fn wants_prompt(&self) -> bool {
        self.running.len() + self.groups.waiting() < self.limits.sequences
    }

    fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    fn tokens(&self) -> u64 {
        self.tokens
    }

    fn has_room_for(&self, prompt: usize) -> bool {
        self.prompt_bytes(prompt)
            + Decoder::forward_bytes(&self.decoder.config, prompt)
            + self.response_bytes(prompt)
            <= self.limits.bytes
    }

    fn push(&mut self, request: Request) {
        assert!(!request.prompt.is_empty() && request.prompt.len() < self.decoder.config.context);
        let needed = (request.prompt.len() + self.how.max_tokens).min(self.decoder.config.context);
        if needed > self.rotations.positions() {
            self.rotations = self.decoder.rotations(needed);
        }
        self.groups.push(request, Prefix::default());
    }

    fn step(&mut self, stopped: Stopped) -> Result<()> {
        self.fill(stopped);
        if self.running.is_empty() {
            return Ok(());
        }
        let step = Step {
            decoder: self.decoder,
            how: &self.how,
            rotations: &self.rotations,
            groups: &self.groups,
        };
        // A share of the sequences for each thread: they step side by side, without a word between them; but each reads all
        // weights. Where that is too few for a share, all threads make every product together.
        let threads = rayon::current_num_threads();
        let shares = match self.running.len() >= LEAST_SHARE * threads {
            true => threads,
            false => 1,
        };
        let most = shares.max(self.storage.len()); // what a step of many shares has used, a later one will
        self.storage.resize_with(most, Storage::default);
        if shares == 1 {
            team::with(|| step.run(&mut self.running, &mut self.storage[0]));
        } else {
            let share = self.running.len().div_ceil(shares);
            (self.running.par_chunks_mut(share))
                .zip(&mut self.storage)
                .for_each(|(running, storage)| step.run(running, storage));
        }
        self.tokens += self.running.len() as u64;
        for i in (0..self.running.len()).rev() {
            if let Some(finish) = self.ended(&self.running[i], stopped) {
                let sequence = self.running.remove(i); // in order: neighbours share a prompt
                self.retire(sequence, finish);
            }
        }
        Ok(())
    }

    fn finished(&mut self) -> Vec<(Request, Vec<Sample>)> {
        self.groups.finished()
    }
}

impl Sequence {
    pub fn draw(&mut self, logits: Row, prompt: &[u32], how: &Sampling) {
        let Drawn { token, logp } = draw(
            logits,
            prompt.iter().chain(&self.token_ids),
            how,
            &mut self.rng,
        );
        self.token_ids.push(token);
        self.logp += logp;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gemm::Precision;
    use crate::kernels::testing::noise;
    use crate::logprob::{self, score};
    use crate::model::Params;
    use crate::weights::Config;
    use serde_json::json;
    use std::path::Path;

    fn decoder(window: Option<usize>, precision: Precision) -> Decoder {
        let config = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "intermediate_size": 20, "rms_norm_eps": 1e-5, "max_position_embeddings": 60, "rope_theta": 100.0,
            "tie_word_embeddings": true, "hidden_act": "silu"
        });
        let mut config = Config::from_json(&config, Path::new("config.json")).unwrap();
        config.windows = vec![window, None];
        let flat: Vec<f32> = noise(Params::new(&config).len, 3)
            .iter()
            .map(|x| x * 0.8)
            .collect();
        Decoder::new(&config, flat.as_slice(), precision).unwrap()
    }

    fn how() -> Sampling {
        Sampling {
            temperature: 0.9,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: 45,
            seed: 7,
        }
    }

    fn requests() -> Vec<Request> {
        let request = |key: &str, prompt: &[u32], k| Request {
            key: key.into(),
            prompt: prompt.to_vec(),
            k,
        };
        vec![
            request("a", &[1, 2, 3], 5),
            request("b", &[9], 3),
            request("c", &[4; 41], 11),
        ]
    }

    fn run(
        decoder: &Decoder,
        how: Sampling,
        requests: Vec<Request>,
        slots: usize,
    ) -> Vec<(String, Vec<Sample>)> {
        keeping(
            Format::Float(decoder.precision),
            decoder,
            how,
            requests,
            slots,
        )
    }

    /// The same with keys and values in another format.
    fn keeping(
        cache: Format,
        decoder: &Decoder,
        how: Sampling,
        requests: Vec<Request>,
        slots: usize,
    ) -> Vec<(String, Vec<Sample>)> {
        let limits = Limits {
            sequences: slots,
            bytes: usize::MAX,
        };
        let mut generator = Generator::new(decoder, how, &[0, 7], limits).with_cache(cache);
        all(&mut generator, requests).0
    }

    /// What comes of requests, and the most sequences that ran at a time.
    fn all(
        generator: &mut Generator,
        requests: Vec<Request>,
    ) -> (Vec<(String, Vec<Sample>)>, usize) {
        let mut waiting = requests.into_iter();
        let (mut out, mut most) = (vec![], 0);
        loop {
            while generator.wants_prompt() {
                let Some(request) = waiting.next() else { break };
                generator.push(request);
            }
            if generator.is_idle() {
                return (out, most);
            }
            generator.step(&|_| false).unwrap();
            most = most.max(generator.running.len());
            out.extend(generator.finished().into_iter().map(|(r, s)| (r.key, s)));
        }
    }

    #[test]
    fn samples_do_not_depend_on_slots_or_company() {
        for (precision, cache) in [
            (Precision::F32, Format::Float(Precision::F32)),
            (Precision::Bf16, Format::Float(Precision::Bf16)),
            (Precision::Bf16, Format::Int8),
        ] {
            let decoder = decoder(Some(8), precision);
            let run = |how, requests, slots| keeping(cache, &decoder, how, requests, slots);
            let all = run(how(), requests(), 64);
            assert_eq!(
                all.iter()
                    .map(|(k, s)| (k.as_str(), s.len()))
                    .collect::<Vec<_>>(),
                [("a", 5), ("b", 3), ("c", 11)]
            );
            for slots in [1, 2, 7] {
                assert_eq!(run(how(), requests(), slots), all, "{slots} slots");
            }
            let alone = run(how(), requests().split_off(2), 3);
            assert_eq!(alone[0], all[2]);
            let other_seed = run(Sampling { seed: 8, ..how() }, requests(), 64);
            assert_ne!(other_seed, all);
        }
    }

    #[test]
    fn little_memory_makes_it_slower_and_nothing_else() {
        let decoder = decoder(None, Precision::F32);
        let expected = run(&decoder, how(), requests(), 64);
        let of = |bytes: usize| {
            let limits = Limits {
                sequences: 64,
                bytes,
            };
            Generator::new(&decoder, how(), &[0, 7], limits)
        };
        let one = of(0).prompt_bytes(41)
            + Decoder::forward_bytes(&decoder.config, 41)
            + of(0).response_bytes(41);
        assert!(of(one).has_room_for(41) && !of(one - 1).has_room_for(41));
        let mut before = 0;
        for bytes in [0, one, 2 * one, usize::MAX] {
            let (samples, most) = all(&mut of(bytes), requests());
            assert_eq!(samples, expected, "{bytes} bytes");
            assert!(before < most, "{most} at a time in {bytes} bytes");
            before = most;
        }
    }

    #[test]
    fn the_log_prob_of_a_sample_is_what_scoring_finds() {
        for window in [None, Some(8)] {
            let decoder = decoder(window, Precision::F32);
            for ((_, samples), request) in run(&decoder, how(), requests(), 6)
                .into_iter()
                .zip(requests())
            {
                let responses = samples.iter().map(|s| s.token_ids.clone()).collect();
                let scores = score(
                    &decoder,
                    &[logprob::Group {
                        prompt: request.prompt,
                        responses,
                    }],
                );
                for (sample, score) in samples.iter().zip(scores) {
                    assert!(
                        (sample.logp - score).abs() < 1e-3,
                        "{} sampled, {score} scored",
                        sample.logp
                    );
                }
            }
        }
    }

    #[test]
    fn responses_end_where_they_should() {
        let decoder = decoder(None, Precision::F32);
        for (_, samples) in run(&decoder, how(), requests(), 64) {
            for sample in samples {
                let ends: Vec<_> = sample
                    .token_ids
                    .iter()
                    .map(|t| [0, 7].contains(t))
                    .collect();
                let (last, before) = ends.split_last().unwrap();
                assert!(!before.contains(&true), "an end token inside a response");
                assert_eq!(*last, sample.finish == FinishReason::Stop);
                assert!(sample.token_ids.len() <= 45);
            }
        }
        let long = run(
            &decoder,
            Sampling {
                max_tokens: 1000,
                ..how()
            },
            requests(),
            64,
        );
        let lengths = long[2].1.iter().map(|s| s.token_ids.len());
        assert_eq!(
            lengths.max(),
            Some(60 - 41),
            "the context bounds prompt and response together"
        );
    }

    #[test]
    fn greedy_is_the_argmax_at_every_step() {
        let decoder = decoder(None, Precision::F32);
        let greedy = Sampling {
            temperature: 0.0,
            max_tokens: 6,
            ..how()
        };
        let (_, samples) = run(&decoder, greedy, requests(), 64).remove(0);
        assert!(samples.windows(2).all(|s| s[0] == s[1]));
        let mut so_far = vec![];
        for &token in &samples[0].token_ids {
            let candidates = |t: u32| [so_far.as_slice(), &[t]].concat();
            let group = logprob::Group {
                prompt: vec![1, 2, 3],
                responses: (0..50).map(candidates).collect(),
            };
            let scores = score(&decoder, &[group]);
            let best = (0..50)
                .max_by(|&a, &b| scores[a].total_cmp(&scores[b]))
                .unwrap();
            assert_eq!(best as u32, token);
            so_far.push(token);
        }
    }
}
