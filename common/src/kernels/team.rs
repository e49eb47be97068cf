//! Threads that stay awake from one loop to the next.
//!
//! A pass over a model is hundreds of loops of some ten microseconds each. The pool puts a thread to sleep that finds
//! nothing to do for a moment, and to wake it costs as much as such a loop. So a pass is run by a *team*: the pool's
//! threads, which for its length wait by spinning. Outside a team a loop is the pool's.

use rayon::prelude::*;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

thread_local! {
    /// The team that this thread leads.
    static LED: Cell<*const Team> = const { Cell::new(ptr::null()) };
    /// Whether this thread is at a task, whose own loops stay in it.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Whether there is a team. One is enough: it takes all threads of the pool but one, and two that wait for a loop of
/// the pool's would wait for each other.
static THERE: AtomicBool = AtomicBool::new(false);

/// Runs `f` with the pool's threads standing by for the loops in it.
pub fn with<R>(f: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    if threads == 1 || THERE.swap(true, Ordering::AcqRel) {
        return f();
    }
    let team = Team::new(threads);
    rayon::in_place_scope(|scope| {
        for member in 1..threads {
            let team = &team;
            scope.spawn(move |_| team.stand_by(member));
        }
        let _leaves = Leaves(&team);
        LED.set(&team);
        f()
    })
}

/// Runs `f(0)` … `f(tasks - 1)`, in no order, on as many threads as there are.
pub fn each(tasks: usize, f: impl Fn(usize) + Sync) {
    let led = LED.get();
    if BUSY.get() {
        (0..tasks).for_each(f);
    } else if led.is_null() {
        (0..tasks).into_par_iter().for_each(&f);
    } else {
        // SAFETY: a leader's team lives until `with` returns, which sets this back.
        unsafe { &*led }.run(tasks, &f);
    }
}

/// Runs `f(i, part)` on the parts of `data` of `len` elements each, the last one perhaps shorter.
pub fn chunks<T: Send>(data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    items(data.chunks_mut(len.max(1)).collect(), f);
}

/// Runs `f(i, item)` on every item.
pub fn items<T: Send>(items: Vec<T>, f: impl Fn(usize, T) + Sync) {
    let items: Vec<Slot<T>> = items
        .into_iter()
        .map(|item| Slot(Cell::new(Some(item))))
        .collect();
    each(items.len(), |i| {
        if let Some(item) = items[i].0.take() {
            f(i, item);
        }
    });
}

struct Slot<T>(Cell<Option<T>>);

// SAFETY: `each` gives every index to one thread once, and only that thread looks into the slot.
unsafe impl<T: Send> Sync for Slot<T> {}

/// The leader's end of a team: leaves it on every way out.
struct Leaves<'a>(&'a Team);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        LED.set(ptr::null());
        self.0.over.store(true, Ordering::Release);
        THERE.store(false, Ordering::Release);
    }
}

/// A loop to run.
struct Loop<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    /// Tasks of a ticket.
    step: usize,
}

struct Team {
    /// The tickets of each member: its part of the loop, which it takes from the front, others from the back.
    tickets: Vec<Tickets>,
    /// The loop at work.
    work: AtomicPtr<Loop<'static>>,
    done: Line<AtomicUsize>,
    over: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A cache line of its own.
#[repr(align(128))]
struct Line<T>(T);

/// (number of the loop: 32 bits, first ticket left: 16, end of the tickets: 16)
type Tickets = Line<AtomicU64>;

const MOST_TICKETS: usize = u16::MAX as usize;

fn unpacked(word: u64) -> (u64, u64) {
    ((word >> 16) & 0xffff, word & 0xffff)
}

impl Team {
    fn new(threads: usize) -> Self {
        Self {
            tickets: (0..threads).map(|_| Line(AtomicU64::new(0))).collect(),
            work: AtomicPtr::new(ptr::null_mut()),
            done: Line(AtomicUsize::new(0)),
            over: AtomicBool::new(false),
            panic: Mutex::new(None),
        }
    }

    /// The leader's side of a loop.
    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let step = tasks.div_ceil(MOST_TICKETS).max(1);
        let count = tasks.div_ceil(step);
        if count <= 1 {
            return (0..tasks).for_each(f);
        }
        let mut work = Loop { f, tasks, step };
        BUSY.set(true);
        self.done.0.store(0, Ordering::Relaxed);
        // SAFETY: only the lifetime changes, and nobody uses the loop after its last ticket is done, which is waited for.
        let erased = unsafe { std::mem::transmute::<*mut Loop<'_>, *mut Loop<'static>>(&mut work) };
        self.work.store(erased, Ordering::Relaxed);
        let members = self.tickets.len();
        for (i, tickets) in self.tickets.iter().enumerate().rev() {
            let number = (tickets.0.load(Ordering::Relaxed) >> 32) + 1;
            let (first, end) = (count * i / members, count * (i + 1) / members);
            let word = (number << 32) | ((first as u64) << 16) | end as u64;
            tickets.0.store(word, Ordering::Release);
        }
        while self.take_one(0) {}
        let mut waiting = Waiting::default();
        while self.done.0.load(Ordering::Acquire) < count {
            waiting.once();
        }
        BUSY.set(false);
        let panic = self.panic.lock().map_or(None, |mut p| p.take());
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// A member's side of the team.
    fn stand_by(&self, member: usize) {
        BUSY.set(true);
        let mut waiting = Waiting::default();
        while !self.over.load(Ordering::Acquire) {
            if self.take_one(member) {
                waiting = Waiting::default();
            } else {
                waiting.once();
            }
        }
        BUSY.set(false);
    }

    /// Runs a ticket, a member's own or another's; false if there is none.
    fn take_one(&self, member: usize) -> bool {
        let members = self.tickets.len();
        (0..members).any(|i| {
            let whose = (member + i) % members;
            self.take_from(whose, whose == member)
        })
    }

    fn take_from(&self, whose: usize, own: bool) -> bool {
        let tickets = &self.tickets[whose].0;
        let mut word = tickets.load(Ordering::Acquire);
        loop {
            let (first, end) = unpacked(word);
            if first >= end {
                return false;
            }
            let work = self.work.load(Ordering::Relaxed);
            let (ticket, rest) = if own {
                (first, word + (1 << 16))
            } else {
                (end - 1, word - 1)
            };
            match tickets.compare_exchange_weak(word, rest, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: the ticket was of the loop whose number the word has, so its loop is the one that was read,
                // and it stays until this ticket is counted as done.
                Ok(_) => unsafe { self.serve(&*work, ticket as usize) },
                Err(now) => {
                    word = now;
                    continue;
                }
            }
            return true;
        }
    }

    fn serve(&self, work: &Loop, ticket: usize) {
        let tasks = ticket * work.step..((ticket + 1) * work.step).min(work.tasks);
        let result = catch_unwind(AssertUnwindSafe(|| tasks.for_each(work.f)));
        if let (Err(payload), Ok(mut panic)) = (result, self.panic.lock()) {
            *panic = Some(payload);
        }
        self.done.0.fetch_add(1, Ordering::Release);
    }
}

/// How a thread passes the time: spinning first, then leaving the processor to others.
#[derive(Default)]
struct Waiting {
    rounds: u32,
}

impl Waiting {
    fn once(&mut self) {
        const SPINS: u32 = 1 << 12;
        if self.rounds < SPINS {
            self.rounds += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests may run beside each other, and only one of them has the team then: the others check the pool's loops.
    fn counts(tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        each(tasks, |i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_once() {
        with(|| {
            for tasks in (0..200).chain([MOST_TICKETS, MOST_TICKETS + 1, 200_000]) {
                assert_eq!(counts(tasks), vec![1; tasks]);
            }
        });
        assert_eq!(counts(1000), vec![1; 1000]);
    }

    #[test]
    fn tasks_may_have_loops_and_items_of_their_own() {
        let mut numbers: Vec<usize> = (0..1000).collect();
        with(|| {
            chunks(&mut numbers, 7, |i, part| {
                assert_eq!(part[0], 7 * i);
                chunks(part, 2, |_, pair| pair.iter_mut().for_each(|n| *n *= 2));
                with(|| assert_eq!(counts(3), vec![1; 3]));
            });
            let owned: Vec<String> = (0..50).map(|i| i.to_string()).collect();
            items(owned, |i, text| assert_eq!(text, i.to_string()));
        });
        assert!(numbers.iter().enumerate().all(|(i, &n)| n == 2 * i));
    }

    #[test]
    fn a_panic_reaches_the_leader_and_the_team_goes_on() {
        with(|| {
            for broken in [0, 99] {
                let result = catch_unwind(|| each(100, |i| assert_ne!(i, broken, "task {i}")));
                let payload = result.expect_err("one task panics");
                let said = payload.downcast_ref::<String>().expect("a text");
                assert!(said.contains(&format!("task {broken}")), "{said}");
                assert_eq!(counts(100), vec![1; 100]);
            }
        });
        let result = catch_unwind(|| with(|| panic!("outside of loops")));
        assert!(result.is_err());
        assert_eq!(with(|| counts(10)), vec![1; 10]);
    }
}
