//! Which samples may start, and which must give way. Nobody knows how long a response will be: memory is shared out by
//! what is likely, and where that was too little, the last in the line start over.

use super::super::slots::{EXPECTED, PAGE};
use super::{Generator, Running};
use anyhow::{Result, ensure};
use std::collections::HashSet;

/// Responses from which on it is known how long they are.
const FEW: u64 = 64;

impl Generator<'_> {
    /// Starts waiting samples in free slots, as long as it looks as if there were pages enough for them to end.
    pub(super) fn fill(&mut self) -> Result<()> {
        while let Some(slot) = self.slots.iter().position(Option::is_none)
            && let Some(group) = (self.again.last().map(|&(group, _)| group)).or(self.groups.next())
            && self.admits(group)?
        {
            let number = match self.again.pop() {
                Some((_, number)) => number,
                None => self.groups.start(group),
            };
            self.start(slot, group, number)?;
        }
        Ok(())
    }

    /// Whether a sample of a group may start: what the running ones are likely to want is theirs.
    fn admits(&mut self, group: usize) -> Result<bool> {
        if self.running() > 0 {
            let wanted = self.unseated(group) + self.expected() + self.promised();
            return Ok(wanted <= self.pages.free.len());
        }
        while self.pages.free.len() < self.unseated(group) + 1 {
            ensure!(
                self.forget_prompt(),
                "the GPU's memory holds keys of {} tokens: too few for a prompt of {} and a response",
                self.pages.all * PAGE,
                self.groups.group(group).request.prompt.len()
            );
        }
        Ok(true)
    }

    /// Pages that a group's prompt has yet to get.
    pub(super) fn unseated(&self, group: usize) -> usize {
        let entry = self.groups.group(group);
        match entry.own.table {
            None => entry.request.prompt.len().div_ceil(PAGE),
            Some(_) => 0,
        }
    }

    /// Pages that a response is likely to take: of the mean of those that have ended and a quarter more, or of a quarter of
    /// the longest, while few have.
    pub(super) fn expected(&self) -> usize {
        match self.ended {
            0..FEW => self.own_pages(0).div_ceil(EXPECTED),
            ended => (self.tokens * 5 / 4).div_ceil(ended * PAGE as u64) as usize,
        }
        .min(self.own_pages(0))
    }

    /// Pages that the running sequences are likely to want beyond those they have: one at least, if they can get so far.
    pub(super) fn promised(&self) -> usize {
        let expected = self.expected();
        let more = |r: &Running| {
            let (has, most) = (r.pages.len(), (r.sequence.limit as usize).div_ceil(PAGE));
            expected.max(has + 1).min(most) - has
        };
        self.slots.iter().flatten().map(more).sum()
    }

    /// A page for each sequence whose next token begins one.
    pub(super) fn grow(&mut self) -> Result<()> {
        for slot in 0..self.slots.len() {
            while let Some(running) = &mut self.slots[slot]
                && running.token_ids.len() / PAGE == running.pages.len()
            {
                let Some(page) = self.pages.free.pop() else {
                    self.make_room()?;
                    continue;
                };
                let at = slot * self.pages.most + running.pages.len();
                self.memory.tables.write(at, &[page])?;
                running.pages.push(page);
            }
        }
        Ok(())
    }

    /// Frees pages: those of a prompt that waits, or of the sequence that is last in the line.
    fn make_room(&mut self) -> Result<()> {
        if self.forget_prompt() {
            return Ok(());
        }
        ensure!(
            self.running() > 1,
            "the GPU's memory is too small for a single response"
        );
        let newest = |&slot: &usize| self.slots[slot].as_ref().map(|r| (r.group, r.number));
        let slot = (0..self.slots.len())
            .max_by_key(newest)
            .expect("there are slots");
        let running = self.slots[slot].take().expect("some run");
        self.pages.free.extend(running.pages);
        self.again.push((running.group, running.number));
        self.again.sort_unstable_by(|a, b| b.cmp(a));
        self.changed = true;
        Ok(())
    }

    /// Gives up the keys of the last prompt of which no sample runs; gives whether there is one.
    pub(super) fn forget_prompt(&mut self) -> bool {
        let used: HashSet<usize> = self.slots.iter().flatten().map(|r| r.group).collect();
        let idle =
            |&group: &usize| self.groups.group(group).own.table.is_some() && !used.contains(&group);
        let Some(group) = self.groups.numbers().rev().find(idle) else {
            return false;
        };
        self.pages.give_back(&mut self.groups.group_mut(group).own);
        true
    }
}
