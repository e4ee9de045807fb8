//! The whole dataset as one Parquet file.

use super::{Dataset, schema};
use crate::{Error, TableFile, TableFormat};
use std::path::Path;

/// Write every row of the dataset at `dir` to the Parquet file `out`; gives the number of rows. `out` appears complete
/// or not at all.
///
/// # Errors
/// Names the shard that cannot be read or the file that cannot be written.
pub fn export_parquet(dir: &Path, out: &Path) -> Result<u64, Error> {
    let dataset = Dataset::open(dir)?;
    let mut file = TableFile::create(out, TableFormat::Parquet, &schema())?;
    for batches in dataset.batches() {
        batches?.iter().try_for_each(|batch| file.write(batch))?;
    }
    file.finish()
}
