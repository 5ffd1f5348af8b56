//! A file that appears under its name when it is whole.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use super::{About, BackupError, Form, verify};

/// Writes pieces of a backup or a dump into a file that appears under its name when it is whole and safe. One that is dropped before leaves nothing.
pub struct Writer {
    form: Form,
    path: PathBuf,
    new: PathBuf,
    file: File,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After the end it has another name.
        match fs::remove_file(&self.new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {e}", self.new.display());
            }
            _ => {}
        }
    }
}

impl Writer {
    /// Begins beside `path`.
    ///
    /// # Errors
    /// When the file cannot be made, or `path` is something else than a file.
    pub fn create(form: Form, path: &Path) -> Result<Writer, BackupError> {
        if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            let needed = "name a new file, or one that is to be replaced";
            return Err(BackupError::NotAFile { file: path.to_owned(), needed });
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let new = path.with_file_name(name);
        let file = File::create(&new);
        let file = file.map_err(|source| BackupError::Io { form, file: new.clone(), source })?;
        Ok(Writer { form, path: path.to_owned(), new, file })
    }

    /// The next piece.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), BackupError> {
        let written = self.file.write_all(piece);
        written.map_err(|source| BackupError::Io { form: self.form, file: self.new.clone(), source })
    }

    /// Reads it back, and gives it its name.
    ///
    /// # Errors
    /// When it is not whole, or cannot be synced; when `stop` is set meanwhile.
    pub fn finish(self, stop: &AtomicBool) -> Result<(About, u64), BackupError> {
        let io = |source| BackupError::Io { form: self.form, file: self.path.clone(), source };
        self.file.sync_all().map_err(io)?;
        let about = verify(self.form, &self.new, stop)?;
        fs::rename(&self.new, &self.path).map_err(io)?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        Ok(about)
    }
}
