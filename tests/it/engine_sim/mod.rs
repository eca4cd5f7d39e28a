//! Seeded simulation of the engine over a fake model whose every mistake of accounting shows as a wrong token.
//!
//! The fake's logits are a hash of the whole context as read back through the block table: tokens (virtual ones and copied
//! entries too), adapter and RoPE regime as they were written to the KV slots. Whoever reads a slot of another context, adapter or regime, or one
//! overwritten too early, gets other tokens than alone. Engines are stepped directly: no threads, no time.

#![allow(clippy::unwrap_used, reason = "a test stops at any surprise")]

mod failures;
mod fake;
mod random;
mod requests;
mod scheduling;
mod sharing;
mod threads;
mod world;
