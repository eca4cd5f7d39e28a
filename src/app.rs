//! Building the parts in order; start, drain, shutdown.
