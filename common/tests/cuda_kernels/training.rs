//! AdamW, clipping, rounding.
