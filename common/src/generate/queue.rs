//! The prompts of a generator in their order: which samples are still to start, and which groups are complete.

use super::engine::{Request, Sample};
use std::collections::VecDeque;

/// Prompts whose samples are not all out, oldest first; each has what a generator keeps of it, `T`.
pub(crate) struct Queue<T> {
    groups: VecDeque<Group<T>>,
    /// How many groups left at the front: the number of the first one.
    retired: usize,
}

/// A prompt at work.
pub(crate) struct Group<T> {
    pub request: Request,
    pub own: T,
    started: usize,
    done: Vec<Option<Sample>>,
}

impl<T> Queue<T> {
    pub fn new() -> Self {
        Self {
            groups: VecDeque::new(),
            retired: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub fn push(&mut self, request: Request, own: T) {
        let done = vec![None; request.k];
        self.groups.push_back(Group {
            request,
            own,
            started: 0,
            done,
        });
    }

    /// The groups, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Group<T>> {
        self.groups.iter()
    }

    /// Samples that have not started.
    pub fn waiting(&self) -> usize {
        self.groups.iter().map(|g| g.request.k - g.started).sum()
    }

    /// Groups of which no sample has started.
    pub fn unstarted(&self) -> usize {
        self.groups.iter().filter(|g| g.started == 0).count()
    }

    /// The numbers of all groups, oldest first.
    pub fn numbers(&self) -> std::ops::Range<usize> {
        self.retired..self.retired + self.groups.len()
    }

    /// Whether no sample of a group has started.
    pub fn is_unstarted(&self, group: usize) -> bool {
        self.group(group).started == 0
    }

    /// The number of the first group with a sample that has not started.
    pub fn next(&self) -> Option<usize> {
        let at = self.groups.iter().position(|g| g.started < g.request.k);
        at.map(|at| self.retired + at)
    }

    /// The numbers of the groups after one.
    pub fn after(&self, group: usize) -> impl Iterator<Item = usize> + use<T> {
        group + 1..self.numbers().end
    }

    /// Starts a sample of a group; gives its number.
    pub fn start(&mut self, group: usize) -> usize {
        let group = self.group_mut(group);
        group.started += 1;
        group.started - 1
    }

    /// A group by its number since the beginning.
    pub fn group(&self, number: usize) -> &Group<T> {
        &self.groups[number - self.retired]
    }

    /// The same, to change.
    pub fn group_mut(&mut self, number: usize) -> &mut Group<T> {
        &mut self.groups[number - self.retired]
    }

    /// A sample is done; gives whether its group is.
    pub fn finish(&mut self, group: usize, number: usize, sample: Sample) -> bool {
        let group = self.group_mut(group);
        group.done[number] = Some(sample);
        group.is_done()
    }

    /// The finished groups at the head of the line, each with its samples in order.
    pub fn finished(&mut self) -> Vec<(Request, Vec<Sample>)> {
        let mut out = vec![];
        while self.groups.front().is_some_and(Group::is_done) {
            let group = self.groups.pop_front().expect("there is a front");
            self.retired += 1;
            out.push((group.request, group.done.into_iter().flatten().collect()));
        }
        out
    }
}

impl<T> Group<T> {
    fn is_done(&self) -> bool {
        self.done.iter().all(Option::is_some)
    }
}
