//! The rotary tables of a model's layers: one for each kind of rotation that occurs.

use crate::kernels::rope::Rotary;
use crate::weights::{Config, QkNorm, Rope};

/// The tables of all layers, for some number of positions.
pub struct Rotations {
    tables: Vec<Rotary>,
    /// Which of the tables each layer has.
    layers: Vec<Option<usize>>,
    positions: usize,
    /// Norms of queries and keys come after the rotation.
    norms_last: bool,
}

impl Rotations {
    /// Those of the positions 0 … `positions` − 1.
    pub fn new(config: &Config, positions: usize) -> Self {
        let mut kinds: Vec<(Rope, usize, usize)> = vec![];
        let mut number = |(i, rope): (usize, &Option<Rope>)| {
            let (half, turned) = (config.heads_of(i).dim / 2, config.rotary_dim_of(i));
            let kind = (rope.clone()?, half, turned);
            let known = kinds.iter().position(|other| *other == kind);
            Some(known.unwrap_or_else(|| {
                kinds.push(kind);
                kinds.len() - 1
            }))
        };
        let layers = config.ropes.iter().enumerate().map(&mut number).collect();
        let table = |(rope, half, turned): (Rope, usize, usize)| {
            let inv_freq = rope.inv_freq(turned);
            let rotary = Rotary::new(&inv_freq, half, rope.growth(), positions);
            match config.query_growth {
                Some(growth) => rotary.with_grown_queries(|position| growth.at(position)),
                None => rotary,
            }
        };
        Self {
            layers,
            tables: kinds.into_iter().map(table).collect(),
            positions,
            norms_last: config.qk_norm == Some(QkNorm::Turned),
        }
    }

    /// That of a layer, if it rotates.
    pub fn of(&self, layer: usize) -> Option<&Rotary> {
        self.number(layer).map(|number| &self.tables[number])
    }

    /// That of a layer as it comes before the norms of queries and keys, and after them.
    pub fn around_norms(&self, layer: usize) -> [Option<&Rotary>; 2] {
        match self.norms_last {
            true => [self.of(layer), None],
            false => [None, self.of(layer)],
        }
    }

    /// Which of the tables is a layer's.
    pub fn number(&self, layer: usize) -> Option<usize> {
        self.layers[layer]
    }

    /// All tables.
    pub fn tables(&self) -> &[Rotary] {
        &self.tables
    }

    /// How many positions they hold.
    pub fn positions(&self) -> usize {
        self.positions
    }
}
