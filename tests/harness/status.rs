//! What `fjord status --json` says.

use std::fmt;

use serde_json::Value;

/// A parsed status.
#[derive(Clone, Debug)]
pub struct Status(pub Value);

impl Status {
    /// From the command's standard output.
    ///
    /// # Errors
    /// When that is not JSON.
    pub fn parse(text: &str) -> Result<Status, String> {
        serde_json::from_str(text).map(Status).map_err(|e| format!("status is not JSON ({e}): {text}"))
    }

    /// The entries of a list.
    pub fn list(&self, key: &str) -> &[Value] {
        self.0[key].as_array().map(Vec::as_slice).unwrap_or_default()
    }

    /// A number of the cluster as a whole.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or_else(|| panic!("no number '{key}' in {self}"))
    }

    /// Data servers that are up.
    pub fn servers_up(&self) -> usize {
        self.list("servers").iter().filter(|s| s["state"] == "up").count()
    }

    /// Targets that are up.
    pub fn targets_up(&self) -> usize {
        self.list("targets").iter().filter(|t| t["state"] == "up").count()
    }

    /// Sessions, attached or not.
    pub fn sessions(&self) -> usize {
        self.list("sessions").len()
    }

    /// Sum of a number over all targets.
    ///
    /// # Panics
    /// When a target lacks it.
    #[track_caller]
    pub fn sum(&self, key: &str) -> u64 {
        let of =
            |t: &Value| t[key].as_u64().unwrap_or_else(|| panic!("a target has no number '{key}': {self}"));
        self.list("targets").iter().map(of).sum()
    }

    /// Shards on all targets.
    pub fn shards(&self) -> u64 {
        self.sum("shards")
    }

    /// Unlinked inodes that are still open.
    pub fn orphans(&self) -> u64 {
        self.number("orphans")
    }

    /// Blocks that wait for deletion.
    pub fn blocks_to_delete(&self) -> u64 {
        self.number("blocks_to_delete")
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
