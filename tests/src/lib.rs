//! Drives the built programs from outside.
