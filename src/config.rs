//! Typed settings: file, then environment, then flags; unknown keys are errors.
