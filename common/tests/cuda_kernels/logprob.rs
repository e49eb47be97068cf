//! log p(target), its gradient, and rewards.
