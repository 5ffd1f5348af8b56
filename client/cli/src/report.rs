//! Output for people and for programs.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// A table with aligned columns and no lines. Columns whose head begins with `>` are aligned to the right.
pub(crate) fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|h| h.trim_start_matches('>')));
    for (i, h) in head.iter().enumerate() {
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, 2));
            if h.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table
}

/// An error with its causes. Some say what their cause says: that is told once.
pub(crate) fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string).filter(|cause| !cause.is_empty()) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

/// Writes to standard output. A reader that went away (`| head`) is not an error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(e).context("cannot write the output"))
        }
        _ => Ok(()),
    }
}

/// Writes a value as indented JSON.
pub(crate) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// The lines of a table without the blanks that fill the last column.
pub(crate) fn lines(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_is_told_once() {
        let denied = || io::Error::from_raw_os_error(13);
        let named = Err::<(), _>(io::Error::other(format!("/root/x: {}", denied()))).context("backup");
        assert_eq!(causes(&named.unwrap_err()), "backup: /root/x: Permission denied (os error 13)");
        let error = anyhow::Error::new(denied()).context(format!("/root/x: {}", denied())).context("backup");
        assert_eq!(causes(&error), "backup: /root/x: Permission denied (os error 13)");
        let plain = anyhow::Error::new(denied()).context("cannot write /x");
        assert_eq!(causes(&plain), "cannot write /x: Permission denied (os error 13)");
    }
}
