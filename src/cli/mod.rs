//! The command line: what can be typed, and what each command does. Exit codes: 0 done, 1 failed, 2 wrong usage.

mod adapter;
mod bench;
mod combine;
mod convert;
mod inspect;
mod serve;
mod settings;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::bench::PlanError;
use crate::config::ConfigError;
use settings::SettingsArgs;

/// Serves one base language model and every fine-tuned adapter of it, mixed in one continuous batch.
#[derive(Debug, Parser)]
#[command(name = "patchbay", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a base model and its adapters over HTTP.
    ///
    /// Without arguments it serves the model in ./sample-model and the adapters in ./adapters on 127.0.0.1:8000.
    Serve(SettingsArgs),
    /// Print the effective settings, each with where its value came from.
    Config(SettingsArgs),
    /// Measure a server's speed: one that runs, or one started for it.
    Bench(bench::BenchArgs),
    /// Check or convert an adapter offline, or list, add and remove those of a running server.
    #[command(subcommand)]
    Adapter(adapter::AdapterCommand),
}

/// Parses the command line, runs the command and returns the exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version arrive here too, with exit code 0. Nothing can be done when the terminal is gone.
            let _ = e.print();
            return if e.exit_code() == 0 { ExitCode::SUCCESS } else { ExitCode::from(2) };
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(io::stderr(), "patchbay: {e:#}");
            ExitCode::from(if e.is::<ConfigError>() || e.is::<PlanError>() { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(settings) => serve::serve(settings.resolve()?.config),
        Command::Config(settings) => Ok(write!(io::stdout(), "{}", settings.resolve()?.to_toml())?),
        Command::Bench(args) => bench::run(args, bench::shown(std::env::args())),
        Command::Adapter(command) => adapter::run(command, &mut io::stdout()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
