//! Gathers and scatters, norms, SwiGLU, rotation.
