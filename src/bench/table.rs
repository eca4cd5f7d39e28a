//! The report as text, row by row.

use std::io::{self, Write};

use super::machine::Machine;
use super::report::{HotLoad, Report, RunReport};
use super::stats::Summary;

/// One line about the machine.
pub(super) fn machine(machine: &Machine, out: &mut dyn Write) -> io::Result<()> {
    let cpu = machine.cpu.as_deref().unwrap_or("unknown processor");
    write!(out, "machine   {cpu}, {} cores, {}", machine.cores, machine.instruction_set)?;
    if let Some(limits) = machine.limits {
        write!(
            out,
            "; reads {:.1} GB/s, multiplies bf16 at {:.0} and f32 at {:.0} GFLOP/s",
            limits.read_gb_per_s, limits.bf16_gflop_per_s, limits.f32_gflop_per_s
        )?;
    }
    writeln!(out)
}

/// What is measured.
pub(super) fn server(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let (server, workload) = (&report.server, &report.workload);
    write!(out, "server    {} at {}", server.model, server.url)?;
    if let Some(start_s) = server.start_s {
        write!(out, ", ready in {start_s:.2} s")?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "workload  {} prompt and {} output tokens, {} adapters, seed {}",
        workload.prompt_tokens, workload.output_tokens, workload.num_adapters, workload.seed
    )
}

/// The head of the table of runs.
pub(super) fn header(out: &mut dyn Write) -> io::Result<()> {
    writeln!(out)?;
    writeln!(
        out,
        "{:20} {:>4} {:>5} {:>4}  {:>8} {:>8} {:>7}  {:^15}  {:^15}  {:^31}",
        "", "", "", "", "output", "total", "", "TTFT ms", "per token ms", "gap ms"
    )?;
    writeln!(
        out,
        "{:20} {:>4} {:>5} {:>4}  {:>8} {:>8} {:>7}  {:>7} {:>7}  {:>7} {:>7}  {:>7} {:>7} {:>7} {:>7}",
        "adapters",
        "at",
        "done",
        "err",
        "tok/s",
        "tok/s",
        "req/s",
        "p50",
        "p99",
        "p50",
        "p99",
        "p50",
        "p90",
        "p99",
        "max"
    )
}

/// What a run is called.
fn label(run: &RunReport) -> String {
    format!("{}{}", run.distribution, if run.load_while.is_some() { ", loading" } else { "" })
}

/// A row of the table of runs, and beneath it what went wrong.
pub(super) fn run(run: &RunReport, out: &mut dyn Write) -> io::Result<()> {
    let get = |summary: &Option<Summary>, of: fn(&Summary) -> f64| {
        summary.as_ref().map_or_else(|| "-".to_owned(), |s| ms(of(s)))
    };
    let (ttft, token, gap) = (&run.ttft_ms, &run.time_per_output_token_ms, &run.inter_token_gap_ms);
    writeln!(
        out,
        "{:20} {:>4} {:>5} {:>4}  {:>8.1} {:>8.1} {:>7.2}  {:>7} {:>7}  {:>7} {:>7}  {:>7} {:>7} {:>7} {:>7}",
        label(run),
        run.concurrency,
        run.completed,
        run.errors.count,
        run.output_tokens_per_s,
        run.total_tokens_per_s,
        run.requests_per_s,
        get(ttft, |s| s.p50),
        get(ttft, |s| s.p99),
        get(token, |s| s.p50),
        get(token, |s| s.p99),
        get(gap, |s| s.p50),
        get(gap, |s| s.p90),
        get(gap, |s| s.p99),
        get(gap, |s| s.max),
    )?;
    if let Some(Summary { count, p50, max, .. }) = run.load_while.as_ref().and_then(|load| load.load_ms.as_ref()) {
        writeln!(out, "    {count} loads meanwhile, p50 {} ms, longest {} ms", ms(*p50), ms(*max))?;
    }
    if let Some(read_gb_per_s) = run.read_gb_per_s {
        writeln!(out, "    memory was read at {read_gb_per_s:.1} GB/s before and after")?;
    }
    if let Some(beside) = &run.against_base {
        write!(
            out,
            "    {:.3} of the base's tok/s, {:.3} of its speed per token",
            beside.output_rate, beside.token_speed
        )?;
        match beside.bound {
            Some(bound) => writeln!(out, "; the bound is {bound:.3}")?,
            None => writeln!(out)?,
        }
    }
    if let Some(message) = &run.errors.first {
        writeln!(out, "    {} errors, the first: {message}", run.errors.count)?;
    }
    if run.short_answers > 0 {
        writeln!(out, "    {} answers are shorter than asked for", run.short_answers)?;
    }
    out.flush()
}

/// Medians over the rounds.
pub(super) fn medians(runs: &[RunReport], out: &mut dyn Write) -> io::Result<()> {
    let is_same = |a: &RunReport, b: &RunReport| {
        (a.distribution, a.concurrency, a.load_while.is_some())
            == (b.distribution, b.concurrency, b.load_while.is_some())
    };
    writeln!(out, "\nmedians")?;
    writeln!(
        out,
        "{:20} {:>4} {:>7}  {:>12} {:>11} {:>13} {:>11}  {:>11} {:>11}",
        "adapters",
        "at",
        "rounds",
        "output tok/s",
        "TTFT p50 ms",
        "per token p50",
        "gap p99 ms",
        "/base tok/s",
        "/base speed"
    )?;
    for (idx, first) in runs.iter().enumerate().filter(|(_, run)| run.round == 1) {
        let rounds: Vec<&RunReport> = runs[idx..].iter().filter(|run| is_same(run, first)).collect();
        let median = |of: &dyn Fn(&RunReport) -> Option<f64>| {
            let mut values: Vec<f64> = rounds.iter().filter_map(|run| of(run)).collect();
            Summary::of(&mut values).map(|summary| summary.p50)
        };
        let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), ms);
        let ratio = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        writeln!(
            out,
            "{:20} {:>4} {:>7}  {:>12.1} {:>11} {:>13} {:>11}  {:>11} {:>11}",
            label(first),
            first.concurrency,
            rounds.len(),
            median(&|run| Some(run.output_tokens_per_s)).unwrap_or(0.0),
            shown(median(&|run| Some(run.ttft_ms?.p50))),
            shown(median(&|run| Some(run.time_per_output_token_ms?.p50))),
            shown(median(&|run| Some(run.inter_token_gap_ms?.p99))),
            ratio(median(&|run| Some(run.against_base?.output_rate))),
            ratio(median(&|run| Some(run.against_base?.token_speed))),
        )?;
    }
    out.flush()
}

/// The table of a hot load.
pub(super) fn hot_load(hot_load: &HotLoad, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nhot load of {} bytes on an idle server\n", hot_load.bytes)?;
    writeln!(out, "{:44} {:>5}  {:>8} {:>8} {:>8}", "ms", "times", "p50", "p90", "max")?;
    let mut row = |label: String, summary: &Option<Summary>| match summary {
        Some(s) => {
            writeln!(out, "{label:44} {:>5}  {:>8} {:>8} {:>8}", s.count, ms(s.p50), ms(s.p90), ms(s.max))
        }
        None => Ok(()),
    };
    row("base model: first token".to_owned(), &hot_load.base_ttft_ms)?;
    for way in &hot_load.ways {
        row(format!("{}: answered", way.way), &way.answered_ms)?;
        row(format!("{}: first token, from the {0}", way.way), &way.first_token_ms)?;
        row(format!("{}: first token, adapter in place", way.way), &way.ttft_in_place_ms)?;
        row(format!("{}: difference of the two", way.way), &way.beyond_prefill_ms)?;
    }
    out.flush()
}

/// Milliseconds with three to four digits.
fn ms(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 1000.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}
