//! Responses that are gathered until there are tokens enough for a forward pass of both models.

use super::rewards::{Logps, RewardModel};
use crate::logprob::Group;
use anyhow::Result;

/// What waits to be scored, in order, each with a `T` that says of what.
pub struct Gathered<T> {
    waiting: Vec<Waiting<T>>,
    tokens: usize,
    /// Tokens enough.
    limit: usize,
}

struct Waiting<T> {
    of: T,
    group: Option<Group>,
    known: Option<Vec<f64>>,
}

/// What was scored: the log-probs of the group's responses, none where there was no group.
pub type Ready<T> = Vec<(T, Vec<Logps>)>;

impl<T> Gathered<T> {
    /// Nothing yet.
    ///
    /// # Errors
    /// A GPU that does not answer.
    pub fn new(models: &RewardModel) -> Result<Self> {
        Ok(Self {
            waiting: vec![],
            tokens: 0,
            limit: models.tokens_at_once()?,
        })
    }

    /// Takes a group, with the policy's log-probs where they are known. Without a group it keeps its place in the order alone.
    /// Gives what waited before it, scored, if there would be too many tokens with it.
    ///
    /// # Errors
    /// As [`RewardModel::score`].
    pub fn push(
        &mut self,
        models: &RewardModel,
        of: T,
        group: Option<Group>,
        known: Option<Vec<f64>>,
    ) -> Result<Ready<T>> {
        // What needs no forward pass must not wait for ever.
        let tokens = group.as_ref().map_or(1, Group::tokens);
        let ready = match self.tokens + tokens > self.limit {
            true => self.score(models)?,
            false => vec![],
        };
        self.tokens += tokens;
        self.waiting.push(Waiting { of, group, known });
        Ok(ready)
    }

    /// Scores what waits.
    ///
    /// # Errors
    /// As [`RewardModel::score`].
    pub fn score(&mut self, models: &RewardModel) -> Result<Ready<T>> {
        self.tokens = 0;
        let (mut groups, mut known, mut whose) = (vec![], vec![], vec![]);
        for waiting in self.waiting.drain(..) {
            whose.push((waiting.of, waiting.group.is_some()));
            if let Some(group) = waiting.group {
                groups.push(group);
                known.push(waiting.known);
            }
        }
        let mut scores = models.score(&groups, known)?.into_iter();
        let mut scored = |has_group| match has_group {
            true => scores.next().expect("one for every group"),
            false => vec![],
        };
        let ready = whose.into_iter();
        Ok(ready
            .map(|(of, has_group)| (of, scored(has_group)))
            .collect())
    }
}
