//! Writing rows that come batch by batch to one Parquet or Arrow file.

use crate::Error;
use crate::trajectories::{rename_into_place, unfinished_name};
use arrow_array::RecordBatch;
use arrow_ipc::writer::FileWriter;
use arrow_schema::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::fmt::Display;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Rows that Parquet holds in memory are written as a row group once they take so many bytes.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// Kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableFormat {
    /// Parquet, compressed by zstd.
    Parquet,
    /// An Arrow IPC file, also called Feather.
    Arrow,
}

impl TableFormat {
    /// The format that the ending of `path` names.
    ///
    /// # Errors
    /// Names the endings that are known.
    pub fn of(path: &Path) -> Result<Self, Error> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("parquet") => Ok(TableFormat::Parquet),
            Some("arrow" | "feather") => Ok(TableFormat::Arrow),
            _ => Err(Error::file(path, "expected a name that ends in .parquet, .arrow or .feather")),
        }
    }
}

/// A file of rows that appears complete or not at all: under its name once it is finished, and not where this is
/// dropped before.
pub struct TableFile {
    path: PathBuf,
    unfinished: PathBuf,
    sink: Option<Sink>,
    num_rows: u64,
}

enum Sink {
    Parquet(Box<ArrowWriter<File>>),
    Arrow(Box<FileWriter<File>>),
}

impl TableFile {
    /// Begin the file at `path`.
    ///
    /// # Errors
    /// Names the file that cannot be written, or a schema that the format does not have.
    pub fn create(path: &Path, format: TableFormat, schema: &SchemaRef) -> Result<Self, Error> {
        let unfinished = unfinished_name(path);
        let file = File::create(&unfinished).map_err(Error::io("create", &unfinished))?;
        let mut table = TableFile { path: path.to_owned(), unfinished, sink: None, num_rows: 0 };
        let sink = match format {
            TableFormat::Parquet => {
                let zstd = Compression::ZSTD(ZstdLevel::default());
                let properties = WriterProperties::builder().set_compression(zstd).build();
                let writer = ArrowWriter::try_new(file, schema.clone(), Some(properties));
                writer.map(|writer| Sink::Parquet(Box::new(writer))).map_err(|e| table.refused(e))
            }
            TableFormat::Arrow => {
                let writer = FileWriter::try_new(file, schema);
                writer.map(|writer| Sink::Arrow(Box::new(writer))).map_err(|e| table.refused(e))
            }
        };
        table.sink = Some(sink?);
        Ok(table)
    }

    fn refused(&self, cause: impl Display) -> Error {
        Error::file(&self.unfinished, format!("cannot write the rows: {cause}"))
    }

    /// Append rows.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), Error> {
        let written = match &mut self.sink {
            Some(Sink::Parquet(writer)) => {
                let written = writer.write(batch);
                let is_full = writer.memory_size() >= ROW_GROUP_BYTES;
                written.and_then(|()| if is_full { writer.flush() } else { Ok(()) }).map_err(|e| e.to_string())
            }
            Some(Sink::Arrow(writer)) => writer.write(batch).map_err(|e| e.to_string()),
            None => unreachable!("a file that is finished is consumed"),
        };
        written.map_err(|cause| self.refused(cause))?;
        self.num_rows += batch.num_rows() as u64;
        Ok(())
    }

    /// Make the file durable, and give it its name; gives the number of rows.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn finish(mut self) -> Result<u64, Error> {
        let file = match self.sink.take() {
            Some(Sink::Parquet(writer)) => writer.into_inner().map_err(|e| self.refused(e)),
            Some(Sink::Arrow(writer)) => writer.into_inner().map_err(|e| self.refused(e)),
            None => unreachable!("a file is finished once"),
        };
        let synced = file.and_then(|file| file.sync_all().map_err(Error::io("sync", &self.unfinished)));
        match synced.and_then(|()| rename_into_place(&self.unfinished, &self.path)) {
            Ok(()) => Ok(self.num_rows),
            Err(error) => {
                self.discard();
                Err(error)
            }
        }
    }

    /// What cannot be removed is named as unfinished, and written over the next time.
    fn discard(&self) {
        let _ = std::fs::remove_file(&self.unfinished);
    }
}

impl Drop for TableFile {
    fn drop(&mut self) {
        if self.sink.is_some() {
            self.discard();
        }
    }
}
