//! A batch's shape on the device: positions, the tiles that attention is cut into, and the angles of its rotation.

use super::decoder::Decoder;
use super::device::{Buffer, Plain};
use super::walks::Walks;
use crate::kernels::layout::Layout;
use crate::kernels::rope::Rotary;
use crate::model::Rotations;
use anyhow::Result;
use std::sync::Arc;

/// cos and sin of every position that was needed so far, `[rows, head_dim / 2]` each, for each kind of rotation.
pub(super) struct Rotation {
    tables: Vec<(Buffer, Buffer)>,
    rotations: Rotations,
}

impl Rotation {
    /// The tables of a layer that rotates, and none of one that does not; and the first of their rows for queries.
    pub fn of(&self, layer: usize) -> (Option<&Buffer>, Option<&Buffer>, i32) {
        let table = self.rotations.number(layer).map(|n| &self.tables[n]);
        let queries = self.rotations.of(layer).map_or(0, Rotary::queries);
        (table.map(|t| &t.0), table.map(|t| &t.1), queries as i32)
    }
}

/// A tile of a batch, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct AttentionTile {
    first: i32,
    rows: i32,
    start: i32,
    prefix: i32,
    prefix_len: i32,
    end: i32,
}

// SAFETY: six 32-bit numbers without padding.
unsafe impl Plain for AttentionTile {}

/// A batch's shape on the device.
pub struct Shape {
    /// Rows of the batch.
    pub tokens: usize,
    /// The position of each row, int32.
    pub positions: Buffer,
    /// The tiles of attention.
    pub tiles: Buffer,
    /// How many.
    pub tile_count: usize,
    pub(super) rotary: Arc<Rotation>,
    /// Of models with linear attention.
    pub(super) walks: Option<Walks>,
}

impl Decoder {
    /// The rotation of at least so many positions.
    pub(super) fn rotation(&self, positions: usize) -> Result<Arc<Rotation>> {
        let mut rotary = self.rotary.lock().expect("no thread panics with the lock");
        if let Some(table) = &*rotary
            && table.rotations.positions() >= positions
        {
            return Ok(table.clone());
        }
        let rotations = Rotations::new(&self.config, positions.next_power_of_two());
        let tables = rotations.tables().iter().map(|rotary| {
            let (cos, sin) = rotary.tables();
            Ok((self.device.buffer_of(cos)?, self.device.buffer_of(sin)?))
        });
        let table = Arc::new(Rotation {
            tables: tables.collect::<Result<_>>()?,
            rotations,
        });
        *rotary = Some(table.clone());
        Ok(table)
    }

    /// Copies a batch's shape to the device.
    pub fn shape(&self, layout: &Layout) -> Result<Shape> {
        let positions: Vec<i32> = layout.positions().map(|p| p as i32).collect();
        let tiles = tiles(layout, self.tile_rows());
        Ok(Shape {
            tokens: layout.tokens(),
            positions: self.device.buffer_of(&positions)?,
            tile_count: tiles.len(),
            tiles: self.device.buffer_of(&tiles)?,
            rotary: self.rotation(layout.longest())?,
            walks: self.walks(layout)?,
        })
    }
}

/// Cuts the segments of a batch into tiles of at most `most` rows. Those that see most come first: they take longest.
fn tiles(layout: &Layout, most: usize) -> Vec<AttentionTile> {
    let mut tiles = vec![];
    let segments = layout.segments();
    for (i, segment) in segments.iter().enumerate() {
        // A root is seen by its branches up to the last.
        let seen_by = match segment.prefix {
            Some(_) => &segments[i..=i],
            None => {
                let branches = segments[i + 1..].iter().take_while(|s| s.prefix.is_some());
                &segments[i..=i + branches.count()]
            }
        };
        let end = seen_by.last().expect("itself at least").tokens.end;
        let prefix = segment.prefix.clone().unwrap_or(0..0);
        for first in segment.tokens.clone().step_by(most) {
            tiles.push(AttentionTile {
                first: first as i32,
                rows: (segment.tokens.end - first).min(most) as i32,
                start: segment.tokens.start as i32,
                prefix: prefix.start as i32,
                prefix_len: prefix.len() as i32,
                end: end as i32,
            });
        }
    }
    tiles.sort_by_key(|t| std::cmp::Reverse(t.prefix_len + t.first + t.rows - t.start));
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_know_who_sees_them() {
        let mut layout = Layout::default();
        layout.push(70, &[3, 0, 40]);
        layout.push(5, &[]);
        let tiles = tiles(&layout, 32);
        let mut rows = vec![0; layout.tokens()];
        for tile in &tiles {
            (tile.first..tile.first + tile.rows).for_each(|r| rows[r as usize] += 1);
        }
        assert!(rows.iter().all(|&n| n == 1), "{rows:?}");
        let at = |first: i32| *tiles.iter().find(|t| t.first == first).unwrap();
        assert_eq!(
            at(64),
            AttentionTile {
                first: 64,
                rows: 6,
                start: 0,
                prefix: 0,
                prefix_len: 0,
                end: 113
            }
        );
        assert_eq!(
            at(73),
            AttentionTile {
                first: 73,
                rows: 32,
                start: 73,
                prefix: 0,
                prefix_len: 70,
                end: 113
            }
        );
        assert_eq!(
            at(113),
            AttentionTile {
                first: 113,
                rows: 5,
                start: 113,
                prefix: 0,
                prefix_len: 0,
                end: 118
            }
        );
        assert_eq!(tiles[0].first, 105, "the tile that sees most");
    }
}
