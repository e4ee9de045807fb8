//! `temper fetch`: trajectories and metrics of a run under way, into a file.

use crate::commands::common::output::{print, print_json};
use crate::commands::control::Target;
use crate::usage;
use serde_json::json;
use std::path::{Path, PathBuf};
use temper_data::{TableFile, TableFormat};
use temper_proto::grpc::{TableClient, TablePart};
use temper_proto::{ServiceResult, TableInfo, TableRequest};

/// Fetch trajectories or metrics of a run under way into a Parquet or Arrow file, over Arrow Flight.
///
/// Without --output it lists what there is to fetch. A step is there once it is complete and part of a checkpoint, so
/// that no resume takes it back; --beyond-checkpoint also gives the complete steps since, which a resume writes again,
/// equal but for timings and worker. The columns of `rollouts` are those of the run's directory; `metrics` has a row
/// for every step and name. The file appears when all rows are in it. A reader holds up nothing: the run does not wait
/// for it, but for ten seconds at its end.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper fetch --controller 10.0.0.1:7070                                      what there is\n  temper fetch --controller 10.0.0.1:7070 --from-step 100 --output late.parquet\n  temper fetch --controller 10.0.0.1:7070 --step 7 --output step.arrow\n  temper fetch --run-dir runs/quickstart --dataset metrics --output metrics.parquet\n  temper fetch --run-dir runs/quickstart --follow --output all.parquet           until the run ends"
)]
pub struct Fetch {
    #[command(flatten)]
    target: Target,
    /// What to fetch: rollouts (trajectories, a row a sample) or metrics (a row a step and name).
    #[arg(long, value_name = "NAME", default_value = "rollouts")]
    dataset: String,
    /// This step alone.
    #[arg(long, value_name = "N", conflicts_with_all = ["from_step", "to_step", "follow"])]
    step: Option<u64>,
    /// From this step on; default: from the first.
    #[arg(long, value_name = "N")]
    from_step: Option<u64>,
    /// Up to this step, included; default: to the last.
    #[arg(long, value_name = "N")]
    to_step: Option<u64>,
    /// Go on with new steps as they are committed, until --to-step or the end of the run.
    #[arg(long)]
    follow: bool,
    /// Also the complete steps after the last checkpoint.
    #[arg(long)]
    beyond_checkpoint: bool,
    /// The file to write: its name ends in .parquet, .arrow or .feather (both Arrow).
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Fetch {
    /// List the tables, or write one of them.
    ///
    /// # Errors
    /// A run that does not answer, a table or step that is not there, a file that cannot be written.
    pub fn run(self) -> anyhow::Result<()> {
        match &self.output {
            Some(output) => {
                let format = TableFormat::of(output).map_err(usage)?;
                let request = self.request();
                let written = |run| write(&TableClient::new(run), &request, (output, format));
                let num_rows = self.target.reach(written)??;
                if self.target.json {
                    let object = json!({"output": output.display().to_string(), "rows": num_rows});
                    print(&format!("{object}\n"))
                } else {
                    print(&format!("{num_rows} rows in {}\n", output.display()))
                }
            }
            None => self.list(),
        }
    }

    fn request(&self) -> TableRequest {
        TableRequest {
            dataset: self.dataset.clone(),
            step: self.step,
            from_step: self.from_step,
            to_step: self.to_step,
            follow: self.follow,
            beyond_checkpoint: self.beyond_checkpoint,
        }
    }

    fn list(&self) -> anyhow::Result<()> {
        let tables = self.target.reach(|run| TableClient::new(run).tables())?;
        if self.target.json {
            return print_json(&tables.iter().map(as_json).collect::<Vec<_>>());
        }
        for table in tables {
            let steps = match (table.steps.first(), table.steps.last()) {
                (Some(first), Some(last)) => format!("{} steps from {first} to {last}", table.steps.len()),
                _ => "no step yet".to_owned(),
            };
            print(&format!("{:<10} {steps}, {} rows, {} bytes\n", table.dataset, table.num_rows, table.num_bytes))?;
        }
        Ok(())
    }
}

fn as_json(table: &TableInfo) -> serde_json::Value {
    let columns: Vec<&String> = table.schema.fields().iter().map(|field| field.name()).collect();
    let size = (table.num_rows, table.num_bytes);
    json!({"dataset": table.dataset, "steps": table.steps, "rows": size.0, "bytes": size.1, "columns": columns})
}

/// Write what `request` asks for; gives the number of rows, or why there is no file.
fn write(
    client: &TableClient,
    request: &TableRequest,
    (path, format): (&Path, TableFormat),
) -> ServiceResult<anyhow::Result<u64>> {
    let mut file = None;
    let written: Result<(), temper_data::Error> = client.read(request, |part| match part {
        TablePart::Schema(schema) => {
            file = Some(TableFile::create(path, format, &schema)?);
            Ok(())
        }
        TablePart::Rows(batch) => file.as_mut().map_or(Ok(()), |file| file.write(&batch)),
    })?;
    let finished = || match file {
        Some(file) => Ok(file.finish()?),
        None => anyhow::bail!("the run sent no columns: {} was not written", path.display()),
    };
    Ok(written.map_err(Into::into).and_then(|()| finished()))
}
