//! Measuring a server over its own HTTP API: one that runs already, or one that is started here from settings.
//!
//! Owns the load (prompts, adapters, concurrency), the clock and the figures. It speaks to the server through a socket
//! only, as any client does: even a server in the same process is asked over loopback. The command line makes the
//! [`Plan`]; [`run`] follows it, writes a table as it goes and returns the [`Report`], whose JSON form
//! `docs/performance.md` describes.

mod bound;
mod client;
mod drive;
mod event;
mod hot_load;
mod local;
mod machine;
mod plan;
mod progress;
mod report;
mod stats;
mod table;
mod target;
mod workload;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow};
use bytes::Bytes;

use client::Client;
use drive::{Drive, Load};
use local::Local;
use progress::Progress;
use target::Target;

pub use bound::AgainstBase;
pub use client::Keys;
pub use machine::{Limits, Machine};
pub use plan::{Distribution, Plan, PlanError, Server};
pub use report::{AdapterReport, Errors, HotLoad, HotLoadWay, LoadWhile, Report, RunReport, ServerReport, Workload};
pub use stats::{Summary, percentile};

/// Follows the plan. The table goes to `out` row by row; a progress bar is shown while standard error is a terminal.
///
/// # Errors
/// A [`PlanError`] when the plan cannot be followed by this server; otherwise when the server cannot be started or asked.
/// Requests that fail while they are measured are counted in the report instead.
pub fn run(plan: &Plan, out: &mut dyn Write) -> Result<Report> {
    plan.check()?;
    let machine = Machine::look(plan.measure_machine);
    let local = match &plan.server {
        Server::Url(_) => None,
        Server::Start { config, copies } => Some(Local::start(config, *copies, plan.uploads())?),
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the client's runtime")?;
    // Interrupted, the scratch store goes away all the same.
    let measured = runtime.block_on(async {
        tokio::select! {
            report = measure(plan, machine, local.as_ref(), out) => report,
            _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        }
    });
    if let Some(local) = local {
        local.stop()?;
    }
    measured
}

async fn measure(plan: &Plan, machine: Machine, local: Option<&Local>, out: &mut dyn Write) -> Result<Report> {
    let url = match (&plan.server, local) {
        (Server::Url(url), _) => url.trim_end_matches('/').to_owned(),
        (Server::Start { .. }, Some(local)) => local.url.clone(),
        (Server::Start { .. }, None) => unreachable!("a server to start was started"),
    };
    let client = Client::new(&url, &plan.keys, Duration::from_secs(plan.silence_s_max))?;
    let target = Target::find(&client, plan, local.map(|local| local.vocab_size)).await?;
    let mut report = Report {
        schema: report::SCHEMA,
        command: plan.command.clone(),
        time: SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs(),
        machine,
        server: ServerReport {
            url,
            in_process: local.is_some(),
            version: client.version().await,
            model: target.base.clone(),
            start_s: local.map(|local| local.start_s),
            adapters: Vec::new(),
        },
        workload: plan.workload(&target),
        runs: Vec::new(),
        hot_load: None,
    };
    table::machine(&report.machine, out)?;
    table::server(&report, out)?;
    if let Some(dir) = &plan.hot_load {
        // A server elsewhere may not read it; a server here takes relative paths from its roots only.
        let path = local.map(|_| dir.canonicalize().with_context(|| dir.display().to_string())).transpose()?;
        let hot_load = hot_load::measure(&client, &target, plan, &upload(dir)?, path.as_deref()).await?;
        table::hot_load(&hot_load, out)?;
        report.hot_load = Some(hot_load);
    } else {
        runs(plan, &client, &target, &mut report, out).await?;
    }
    report.server.adapters = target.described(&client).await;
    Ok(report)
}

/// Every run of every round, in turn.
async fn runs(plan: &Plan, client: &Client, target: &Target, report: &mut Report, out: &mut dyn Write) -> Result<()> {
    let load = plan.load_while.as_deref().map(upload).transpose()?.map(|archive| Load { archive });
    let mut prompts = workload::Prompts::new(plan.seed, target.vocab_size, plan.prompt_tokens);
    if plan.distributions.iter().any(Distribution::wants_warm_adapters) {
        target.warm(client, &mut prompts).await?;
    }
    let adapters = target.described(client).await;
    // It changes with what else uses the memory.
    let bandwidth = || plan.measure_machine.then(machine::read_gb_per_s);
    table::header(out)?;
    for round in 1..=plan.rounds {
        for distribution in &plan.distributions {
            for concurrency in &plan.concurrency {
                // Without and with, one after the other, so that they can be compared.
                for load in std::iter::once(None).chain(load.as_ref().map(Some)) {
                    let drive = Drive {
                        client,
                        target,
                        distribution,
                        concurrency: *concurrency,
                        requests: plan.requests_at(*concurrency),
                        warm_up: plan.warm_up.unwrap_or(*concurrency),
                        prompt_tokens: plan.prompt_tokens,
                        output_tokens: plan.output_tokens,
                        seed: plan.seed.wrapping_add(round as u64),
                    };
                    let before = bandwidth();
                    let mut run = drive.run(&mut prompts, load).await?;
                    run.round = round;
                    run.read_gb_per_s = before.zip(bandwidth()).map(|(before, after)| (before + after) / 2.0);
                    run.against_base = bound::against_base(&run, &report.runs, &adapters);
                    table::run(&run, out)?;
                    report.runs.push(run);
                }
            }
        }
    }
    if plan.rounds > 1 {
        table::medians(&report.runs, out)?;
    }
    Ok(())
}

/// An adapter directory as the tar archive that is uploaded.
fn upload(dir: &Path) -> Result<Bytes> {
    let files = crate::store::AdapterDirectory::open(dir)?;
    let mut archive = tar::Builder::new(Vec::new());
    for (name, path) in [("adapter_config.json", &files.config), ("adapter_model.safetensors", &files.weights)] {
        archive.append_path_with_name(path, name).with_context(|| path.display().to_string())?;
    }
    Ok(archive.into_inner().context("packing the adapter")?.into())
}
