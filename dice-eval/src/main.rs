//! dice-eval: did a round help? Figures of preference pairs and of samples (step 5 of a DICE round).

mod annotations;
mod compare;
mod covariates;
mod format;
mod implicit;
mod judge;
mod lists;
mod preference;
mod report;
mod reward;
mod samples;
#[cfg(test)]
mod testing;
mod weights;
mod win_rate;

use anyhow::Result;
use clap::{Parser, Subcommand};
use common::program;
use std::process::ExitCode;

/// Tell whether a round helped: win rates, reward accuracy on preference pairs, figures of samples
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Reward(reward::Args),
    Samples(samples::Args),
    WinRate(win_rate::Args),
    Compare(compare::Args),
    Judge(judge::Args),
    Report(report::Args),
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Reward(args) => reward::run(args),
        Command::Samples(args) => samples::run(args),
        Command::WinRate(args) => win_rate::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Judge(args) => judge::run(args),
        Command::Report(args) => report::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_flag_has_help() {
        let mut command = Args::command().help_expected(true);
        command.build();
        command.debug_assert();
    }
}
