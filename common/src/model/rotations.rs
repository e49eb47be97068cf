//! The rotary tables of a model's layers: one for each kind of rotation that occurs.

use crate::kernels::rope::Rotary;
use crate::weights::{Config, Rope};

/// The tables of all layers, for some number of positions.
pub struct Rotations {
    tables: Vec<Rotary>,
    /// Which of the tables each layer has.
    layers: Vec<Option<usize>>,
    positions: usize,
}

impl Rotations {
    /// Those of the positions 0 … `positions` − 1.
    pub fn new(config: &Config, positions: usize) -> Self {
        let mut kinds: Vec<Rope> = vec![];
        let mut number = |rope: &Rope| {
            let known = kinds.iter().position(|kind| kind == rope);
            known.unwrap_or_else(|| {
                kinds.push(rope.clone());
                kinds.len() - 1
            })
        };
        let layers = config
            .ropes
            .iter()
            .map(|rope| rope.as_ref().map(&mut number));
        let layers = layers.collect();
        let half = config.head_dim / 2;
        let table = |rope: Rope| {
            let inv_freq = rope.inv_freq(config.rotary_dim);
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
        }
    }

    /// That of a layer, if it rotates.
    pub fn of(&self, layer: usize) -> Option<&Rotary> {
        self.number(layer).map(|number| &self.tables[number])
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
