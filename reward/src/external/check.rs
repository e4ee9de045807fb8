//! What can be known of an external reward without running it: whether its files and programs are there.

use super::config::PythonConfig;
use crate::Error;
use crate::config::{ComponentConfig, RewardKind};
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What a component needs to run is there: files can be read, programs are found in the directories of `search_path`.
pub(crate) fn component(component: &ComponentConfig, search_path: &OsStr) -> Result<(), Error> {
    let checked = match &component.kind {
        RewardKind::Command(config) => {
            find_program(config.command.first().map_or("", String::as_str), search_path).map(|_found| ())
        }
        RewardKind::Python(config) => python(config, search_path),
        _ => Ok(()),
    };
    checked.map_err(|cause| Error::External { component: component.name().to_owned(), cause })
}

fn python(config: &PythonConfig, search_path: &OsStr) -> Result<(), String> {
    let path = config.path.display();
    if config.path.is_dir() {
        return Err(format!("{path} is a directory: expected a Python file"));
    }
    std::fs::File::open(&config.path).map_err(|e| format!("cannot read the Python file {path}: {e}"))?;
    find_program(&config.python, search_path).map(|_found| ())
}

/// The file that a program's name means: itself where it has a slash, else the first in the search path.
fn find_program(name: &str, search_path: &OsStr) -> Result<PathBuf, String> {
    if name.contains('/') {
        let path = Path::new(name);
        return match std::fs::metadata(path) {
            Err(e) => Err(format!("cannot run {name}: {e}")),
            Ok(_) if is_program(path) => Ok(path.to_path_buf()),
            Ok(_) => Err(format!("cannot run {name}: expected an executable file")),
        };
    }
    let found = std::env::split_paths(search_path).map(|dir| dir.join(name)).find(|path| is_program(path));
    found.ok_or_else(|| format!("there is no program `{name}` in PATH: expected one, or a path to it"))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let path = OsStr::new("/nowhere:/bin:/usr/bin");
        assert!(find_program("sh", path).is_ok() && find_program("/bin/sh", path).is_ok());
        for (name, part) in [
            ("no-such-program", "no program `no-such-program` in PATH"),
            ("/bin/no-such-program", "No such file"),
            ("/bin", "expected an executable file"),
            ("/proc/self/stat", "expected an executable file"),
        ] {
            let error = find_program(name, path).expect_err(name);
            assert!(error.contains(part), "{error}");
        }
    }
}
