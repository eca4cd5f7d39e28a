//! The command line: what can be typed, and what each command does.

use std::process::ExitCode;

/// Parses the command line, runs the command and returns the exit code.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
