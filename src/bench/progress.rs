//! A bar on the terminal, and nothing where there is none.

use indicatif::{ProgressBar, ProgressStyle};

/// How far something is.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// A bar of `steps` steps on standard error.
    pub(super) fn new(what: &str, steps: usize) -> Self {
        let bar = ProgressBar::new(steps as u64).with_message(what.to_owned());
        let style = ProgressStyle::with_template("{msg}  {bar:40}  {pos}/{len}  {elapsed} of about {duration}");
        bar.set_style(style.expect("the template is well formed"));
        Self(bar)
    }

    /// One step is done.
    pub(super) fn step(&self) {
        self.0.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
