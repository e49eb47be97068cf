//! Rotary positions in Hugging Face's layout: dimension i is paired with i + head_dim/2. Of heads that turn in part, the pairs
//! that stay as they are come last in both halves.

use super::isa::multiversion;

/// cos and sin of position · frequency, for the positions 0 … `positions` − 1.
pub struct Rotary {
    half: usize,
    /// `[rows, half]` each: a row for each position, and where queries grow with theirs, one more for each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The row that is a query's at position 0.
    queries: usize,
}

impl Rotary {
    /// `inv_freq` has an entry for each of the `half` = head_dim/2 pairs, or for those that turn. Angles are formed in float32,
    /// as transformers does; what is rotated grows by `growth`, which the tables have as a factor.
    pub fn new(inv_freq: &[f32], half: usize, growth: f32, positions: usize) -> Self {
        let turned = |p: usize, f: &f32| {
            let angle = p as f32 * f;
            (angle.cos() * growth, angle.sin() * growth)
        };
        let still = std::iter::repeat_n((1.0, 0.0), half - inv_freq.len());
        let position = |p| {
            inv_freq
                .iter()
                .map(move |f| turned(p, f))
                .chain(still.clone())
        };
        let (cos, sin) = (0..positions).flat_map(position).unzip();
        Self {
            half,
            cos,
            sin,
            queries: 0,
        }
    }

    /// The same, with rows of their own for queries, which grow by `growth` of their position.
    pub fn with_grown_queries(mut self, growth: impl Fn(usize) -> f32) -> Self {
        let half = self.half;
        for table in [&mut self.cos, &mut self.sin] {
            let grown = |(i, value): (usize, &f32)| value * growth(i / half);
            let grown: Vec<_> = table.iter().enumerate().map(grown).collect();
            table.extend(grown);
        }
        self.queries = self.cos.len() / 2 / half;
        self
    }

    /// The row that is a query's at position 0: that of the position itself, or of those that have grown the first.
    pub fn queries(&self) -> usize {
        self.queries
    }

    /// cos and sin, `[rows, half]` each.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Rotates one head vector `[head_dim]` in place, by the row of a key's position or, from [`Self::queries`] on, a query's.
    pub fn rotate(&self, head: &mut [f32], row: usize) {
        let (x, y) = head.split_at_mut(self.half);
        turn(
            x,
            y,
            self.row(&self.cos, row),
            self.row(&self.sin, row),
            1.0,
        );
    }

    /// The gradient of [`Self::rotate`]: turned the other way, and grown as there.
    pub fn rotate_back(&self, head: &mut [f32], row: usize) {
        let (x, y) = head.split_at_mut(self.half);
        turn(
            x,
            y,
            self.row(&self.cos, row),
            self.row(&self.sin, row),
            -1.0,
        );
    }

    fn row<'a>(&self, table: &'a [f32], row: usize) -> &'a [f32] {
        &table[row * self.half..][..self.half]
    }
}

multiversion! {
    pub fn turn(x: &mut [f32], y: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for (((x, y), &c), &s) in x.iter_mut().zip(y).zip(cos).zip(sin) {
            let s = s * sign;
            (*x, *y) = (*x * c - *y * s, *y * c + *x * s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_back_restores_and_position_zero_does_nothing() {
        let rotary = Rotary::new(&[1.0, 0.1], 2, 1.0, 8);
        let head = [1.0, 2.0, 3.0, 4.0];
        let mut turned = head;
        rotary.rotate(&mut turned, 0);
        assert_eq!(turned, head);
        rotary.rotate(&mut turned, 5);
        let (s, c) = 5f32.sin_cos();
        assert!(
            (turned[0] - (c - 3.0 * s)).abs() < 1e-6 && (turned[2] - (3.0 * c + s)).abs() < 1e-6
        );
        let grown = Rotary::new(&[1.0, 0.1], 2, 2.5, 8);
        let mut larger = head;
        grown.rotate(&mut larger, 5);
        assert!(
            larger
                .iter()
                .zip(turned)
                .all(|(x, y)| (x - 2.5 * y).abs() < 1e-5)
        );
        let queries = Rotary::new(&[1.0, 0.1], 2, 1.0, 8).with_grown_queries(|p| p as f32);
        assert_eq!(queries.queries(), 8);
        for (row, growth) in [(5, 1.0), (8 + 5, 5.0)] {
            let mut own = head;
            queries.rotate(&mut own, row);
            let mut both = own.iter().zip(turned);
            assert!(both.all(|(x, y)| (x - growth * y).abs() < 1e-5));
        }
        rotary.rotate_back(&mut turned, 5);
        assert!(turned.iter().zip(head).all(|(x, y)| (x - y).abs() < 1e-6));
    }
}
