//! Permission bits that mean more than permission.

/// Runs with the owner's rights.
pub const SETUID: u32 = 0o4000;
/// Runs with the group's rights; of a directory: what is made in it belongs to its group.
pub const SETGID: u32 = 0o2000;
/// All bits of a mode but the file type.
pub const PERMISSIONS: u32 = 0o7777;

const GROUP_EXECUTE: u32 = 0o010;

/// What is left of a file's mode when somebody without the right to keep suid and sgid changes the file.
pub fn without_suid(mode: u32) -> u32 {
    // Without group execute the bit marks mandatory locking, not a privilege.
    let sgid = if mode & GROUP_EXECUTE == 0 { 0 } else { SETGID };
    mode & !(SETUID | sgid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_privileges_are_dropped() {
        assert_eq!(without_suid(0o7777), 0o1777);
        assert_eq!(without_suid(0o6745), 0o2745);
        assert_eq!(without_suid(0o644), 0o644);
    }
}
