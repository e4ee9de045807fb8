//! The whole dataset as one Parquet file.

use super::writer::{rename_into_place, unfinished_name};
use super::{Dataset, schema};
use crate::Error;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use std::fs::File;
use std::path::Path;

/// Write every row of the dataset at `dir` to the Parquet file `out`; gives the number of rows. `out` appears complete
/// or not at all.
///
/// # Errors
/// Names the shard that cannot be read or the file that cannot be written.
pub fn export_parquet(dir: &Path, out: &Path) -> Result<u64, Error> {
    let dataset = Dataset::open(dir)?;
    let unfinished = unfinished_name(out);
    let file = File::create(&unfinished).map_err(Error::io("create", &unfinished))?;
    match write_rows(&dataset, file, &unfinished) {
        Ok(num_rows) => rename_into_place(&unfinished, out).map(|()| num_rows),
        Err(error) => {
            std::fs::remove_file(&unfinished).map_err(Error::io("remove", &unfinished))?;
            Err(error)
        }
    }
}

fn write_rows(dataset: &Dataset, file: File, path: &Path) -> Result<u64, Error> {
    let refused = |e: ParquetError| Error::file(path, format!("cannot write Parquet: {e}"));
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(file, schema(), Some(properties)).map_err(refused)?;
    let mut num_rows = 0;
    for batches in dataset.batches() {
        for batch in batches? {
            writer.write(&batch).map_err(refused)?;
            num_rows += batch.num_rows() as u64;
        }
    }
    let file = writer.into_inner().map_err(refused)?;
    file.sync_all().map_err(Error::io("sync", path))?;
    Ok(num_rows)
}
