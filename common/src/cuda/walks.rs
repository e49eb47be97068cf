//! How linear attention walks over a batch: which memory each segment begins with and where it leaves its own, forth and back.

use super::device::{Buffer, Device, Plain};
use crate::kernels::delta::groups;
use crate::kernels::layout::{Layout, Segment};
use anyhow::Result;
use std::ops::Range;

/// Memories that exist at a time, unless the branches of a single root are more.
pub(super) const MOST_MEMORIES: usize = 64;

/// A segment of a batch, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct DeltaSegment {
    first: i32,
    rows: i32,
    prefix: i32,
    prefix_len: i32,
    end: i32,
}

// SAFETY: five 32-bit numbers without padding.
unsafe impl Plain for DeltaSegment {}

/// Tokens that a block walks over, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(super) struct DeltaSpan {
    pub first: i32,
    pub rows: i32,
    pub from: i32,
    pub froms: i32,
    pub to: i32,
}

// SAFETY: as above.
unsafe impl Plain for DeltaSpan {}

impl DeltaSpan {
    /// Over the tokens of a segment, from nothing and leaving nothing.
    pub fn over(segment: &Segment) -> Self {
        Self {
            first: segment.tokens.start as i32,
            rows: segment.tokens.len() as i32,
            to: -1,
            ..Self::default()
        }
    }
}

/// Spans of the groups whose memories exist together: the roots', then the branches'.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub roots: Range<usize>,
    pub branches: Range<usize>,
}

/// The walks over a batch, on the device.
pub(super) struct Walks {
    /// The segment of each row, and the segments.
    pub segment_of: Buffer,
    pub segments: Buffer,
    pub segment_count: usize,
    /// Forth; a root leaves its memory for its branches.
    pub spans: Buffer,
    /// Back, in the same order; branches leave the gradients of the memory that they began with for their root.
    pub back: Buffer,
    pub parts: Vec<Part>,
    /// What roots leave.
    pub memories: Buffer,
    /// How many memories there are at most, those of gradients included.
    pub most: usize,
}

impl Walks {
    /// Those over a batch of a model whose memories take so many bytes each.
    pub fn new(device: &Device, layout: &Layout, bytes: usize) -> Result<Self> {
        let segments = layout.segments();
        let rows = |(i, segment): (i32, &Segment)| vec![i; segment.tokens.len()];
        let segment_of: Vec<i32> = (0..).zip(segments).flat_map(rows).collect();
        let plan = Plan::new(layout);
        Ok(Self {
            segment_of: device.buffer_of(&segment_of)?,
            segments: device.buffer_of(&delta_segments(layout))?,
            segment_count: segments.len(),
            spans: device.buffer_of(&plan.spans)?,
            back: device.buffer_of(&plan.back)?,
            parts: plan.parts,
            most: plan.most,
            memories: device.allocate(plan.roots * bytes)?,
        })
    }
}

fn delta_segments(layout: &Layout) -> Vec<DeltaSegment> {
    let of_group = |group: &[Segment]| {
        let end = group[group.len() - 1].tokens.end;
        let segment = |segment: &Segment| {
            let prefix = segment.prefix.clone().unwrap_or(0..0);
            DeltaSegment {
                first: segment.tokens.start as i32,
                rows: segment.tokens.len() as i32,
                prefix: prefix.start as i32,
                prefix_len: prefix.len() as i32,
                end: segment.prefix.as_ref().map_or(end, |_| segment.tokens.end) as i32,
            }
        };
        group.iter().map(segment).collect::<Vec<_>>()
    };
    groups(layout).flat_map(of_group).collect()
}

/// The same as the host has it.
#[derive(Default)]
struct Plan {
    spans: Vec<DeltaSpan>,
    back: Vec<DeltaSpan>,
    parts: Vec<Part>,
    /// The most roots of a part with branches, and the most segments.
    roots: usize,
    most: usize,
}

impl Plan {
    fn new(layout: &Layout) -> Self {
        let mut plan = Self::default();
        let (mut part, mut memories) = (vec![], 0);
        for group in groups(layout) {
            if memories > 0 && memories + group.len() > MOST_MEMORIES {
                plan.push(&std::mem::take(&mut part));
                memories = 0;
            }
            part.push(group);
            memories += group.len();
        }
        plan.push(&part);
        plan
    }

    /// Roots are numbered first, so that there need be no more memories than roots on the way forth alone.
    fn push(&mut self, groups: &[&[Segment]]) {
        let (start, middle) = (self.spans.len(), self.spans.len() + groups.len());
        let mut branch = groups.len() as i32;
        for (root, group) in (0..).zip(groups) {
            let branches = group.len() as i32 - 1;
            self.spans.push(DeltaSpan {
                to: if branches > 0 { root } else { -1 },
                ..DeltaSpan::over(&group[0])
            });
            self.back.push(DeltaSpan {
                from: branch,
                froms: branches,
                ..DeltaSpan::over(&group[0])
            });
            branch += branches;
        }
        let branches = (0..)
            .zip(groups)
            .flat_map(|(root, group)| group[1..].iter().map(move |segment| (root, segment)));
        for ((root, segment), branch) in branches.zip(groups.len() as i32..) {
            self.spans.push(DeltaSpan {
                from: root,
                froms: 1,
                ..DeltaSpan::over(segment)
            });
            self.back.push(DeltaSpan {
                to: branch,
                ..DeltaSpan::over(segment)
            });
        }
        self.parts.push(Part {
            roots: start..middle,
            branches: middle..self.spans.len(),
        });
        if self.spans.len() > middle {
            self.roots = self.roots.max(groups.len());
        }
        self.most = self.most.max(self.spans.len() - start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_go_on_from_their_root_and_give_their_gradients_to_it() {
        let mut layout = Layout::default();
        layout.push(5, &[4, 0]);
        layout.push(7, &[]);
        layout.push(2, &[3]);
        let plan = Plan::new(&layout);
        assert_eq!((plan.roots, plan.most), (3, 6));
        let [part] = &plan.parts[..] else {
            panic!("{:?}", plan.parts)
        };
        assert_eq!((part.roots.clone(), part.branches.clone()), (0..3, 3..6));
        let numbers = |spans: &[DeltaSpan]| {
            let numbers = spans
                .iter()
                .map(|s| (s.first, s.rows, s.from, s.froms, s.to));
            numbers.collect::<Vec<_>>()
        };
        assert_eq!(
            numbers(&plan.spans),
            [
                (0, 5, 0, 0, 0),
                (9, 7, 0, 0, -1),
                (16, 2, 0, 0, 2),
                (5, 4, 0, 1, -1),
                (9, 0, 0, 1, -1),
                (18, 3, 2, 1, -1),
            ]
        );
        assert_eq!(
            numbers(&plan.back),
            [
                (0, 5, 3, 2, -1),
                (9, 7, 5, 0, -1),
                (16, 2, 5, 1, -1),
                (5, 4, 0, 0, 3),
                (9, 0, 0, 0, 4),
                (18, 3, 0, 0, 5),
            ]
        );
    }

    #[test]
    fn parts_have_few_memories_unless_one_root_has_many_branches() {
        let mut layout = Layout::default();
        for branches in [1, 30, 30, 1, 70, 2] {
            layout.push(3, &vec![1; branches]);
        }
        let plan = Plan::new(&layout);
        let sizes: Vec<_> = (plan.parts.iter())
            .map(|part| (part.roots.len(), part.branches.len()))
            .collect();
        assert_eq!(sizes, [(3, 61), (1, 1), (1, 70), (1, 2)]);
        assert_eq!((plan.roots, plan.most), (3, 71));
    }
}
