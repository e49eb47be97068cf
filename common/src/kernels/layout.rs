//! How a packed batch lies: the segments of its tokens, and the heads of a row.
//!
//! A batch is a row of segments without padding. A root segment (a prompt) is followed by its branches (responses):
//! a branch's tokens see the whole root and their own past, not their siblings. So K responses cost one pass over the
//! prompt, and the gradients of all of them meet in it.

use std::ops::Range;

/// A run of tokens in the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its tokens' rows in the batch.
    pub tokens: Range<usize>,
    /// The position of its first token in its sequence: the length of its root, if it continues one.
    pub position: usize,
    /// The tokens of the root that it continues; none for a root.
    pub prefix: Option<Range<usize>>,
}

/// The segments of a batch, in the order of their tokens, which they cover without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    segments: Vec<Segment>,
}

impl Layout {
    /// Appends a prompt of `root` tokens and one branch per entry of `branches`.
    pub fn push(&mut self, root: usize, branches: &[usize]) {
        let start = self.tokens();
        let prefix = start..start + root;
        self.segments.push(Segment {
            tokens: prefix.clone(),
            position: 0,
            prefix: None,
        });
        for &len in branches {
            let start = self.tokens();
            let tokens = start..start + len;
            self.segments.push(Segment {
                tokens,
                position: root,
                prefix: Some(prefix.clone()),
            });
        }
    }

    /// The segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The number of tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |s| s.tokens.end)
    }

    /// The position of every token in its sequence.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.segments
            .iter()
            .flat_map(|s| (0..s.tokens.len()).map(|i| s.position + i))
    }

    /// The largest position plus one.
    pub fn longest(&self) -> usize {
        self.segments
            .iter()
            .map(|s| s.position + s.tokens.len())
            .max()
            .unwrap_or(0)
    }
}

/// The heads of a layer. A row of the fused projection is `[q: heads·dim | k: kv_heads·dim | v: kv_heads·dim]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; each serves `query / kv` query heads.
    pub kv: usize,
    /// Elements per head.
    pub dim: usize,
    /// How many positions back a token sees, itself included; none for all.
    pub window: Option<usize>,
    /// What scores are multiplied by: 1/√dim, or what a family has in its place.
    pub scale: f32,
    /// What scores are softly held within, if anything.
    pub cap: Option<f32>,
}

impl Heads {
    /// Heads that see all of the past, their scores over √dim.
    pub fn new(query: usize, kv: usize, dim: usize) -> Self {
        Self {
            query,
            kv,
            dim,
            window: None,
            scale: 1.0 / (dim as f32).sqrt(),
            cap: None,
        }
    }

    /// Elements of a row of q.
    pub fn q_width(&self) -> usize {
        self.query * self.dim
    }

    /// Elements of a row of k, and of v.
    pub fn kv_width(&self) -> usize {
        self.kv * self.dim
    }

    /// Elements of a row of the fused projection.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.query / self.kv
    }

    /// Where a row of the fused projection has a key head.
    pub(super) fn k_at(&self, kv_head: usize) -> usize {
        self.q_width() + kv_head * self.dim
    }

    /// And its values.
    pub(super) fn v_at(&self, kv_head: usize) -> usize {
        self.q_width() + self.kv_width() + kv_head * self.dim
    }
}
