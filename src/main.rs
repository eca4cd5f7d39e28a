//! The `patchbay` program: parse, run, exit code.

fn main() -> std::process::ExitCode {
    patchbay::cli::main()
}
