//! Called as `mount.fuse.fjord` by mount(8): `SOURCE DIR [-sfnvrw] [-t TYPE] [-N NAMESPACE] [-o OPTIONS]`.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

const USAGE: &str = "usage: mount.fuse.fjord HOST:PORT DIR [-sfnv] [-o OPTIONS]";

/// The arguments as `fjord mount` takes them, or unchanged when this is not a call by mount(8).
///
/// # Errors
/// The usage, when the arguments are not what mount(8) gives.
pub(crate) fn translate(args: &[OsString]) -> Result<Vec<OsString>, String> {
    let name = args.first().and_then(|a| Path::new(a).file_name()).unwrap_or_default();
    if name != "mount.fuse.fjord" && name != "mount.fjord" {
        return Ok(args.to_vec());
    }
    let mut out: Vec<OsString> = ["fjord", "mount"].map(OsString::from).to_vec();
    let mut places = 0;
    let mut rest = args[1..].iter();
    while let Some(arg) = rest.next() {
        match arg.to_str() {
            Some("-o") => {
                let options = rest.next().ok_or(USAGE)?;
                out.extend([OsString::from("-o"), options.clone()]);
            }
            // Type and namespace: the first is known, into the second mount(8) has already gone.
            Some("-t" | "-N") => {
                rest.next().ok_or(USAGE)?;
            }
            Some(flags) if flags.starts_with('-') && flags.len() > 1 => {
                for flag in flags[1..].chars() {
                    match flag {
                        's' => out.push("--sloppy".into()),
                        'f' => out.push("--fake".into()),
                        'r' => out.extend(["-o", "ro"].map(OsString::from)),
                        'w' => out.extend(["-o", "rw"].map(OsString::from)),
                        // No mtab is ever written, and we are as verbose as we are.
                        'n' | 'v' => {}
                        _ => return Err(format!("mount.fuse.fjord: unknown flag -{flag}\n{USAGE}")),
                    }
                }
            }
            _ => {
                places += 1;
                out.push(plain(arg));
            }
        }
    }
    if places == 2 { Ok(out) } else { Err(USAGE.to_owned()) }
}

/// fstab users also write the source as `fjord#HOST:PORT`, as for other FUSE filesystems.
fn plain(arg: &OsStr) -> OsString {
    arg.to_str().and_then(|a| a.strip_prefix("fjord#")).map_or_else(|| arg.to_owned(), OsString::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<String, String> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        translate(&args).map(|args| args.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn mount8_calls_are_translated() {
        assert_eq!(
            of("/sbin/mount.fuse.fjord m:1 /mnt -o rw,noatime").unwrap(),
            "fjord mount m:1 /mnt -o rw,noatime"
        );
        assert_eq!(
            of("mount.fjord fjord#m:1 /mnt -sn -t x -o ro").unwrap(),
            "fjord mount m:1 /mnt --sloppy -o ro"
        );
        assert_eq!(of("mount.fuse.fjord m:1 /mnt -f").unwrap(), "fjord mount m:1 /mnt --fake");
    }

    #[test]
    fn other_calls_are_left_alone() {
        assert_eq!(of("/usr/bin/fjord mount -x").unwrap(), "/usr/bin/fjord mount -x");
    }

    #[test]
    fn wrong_calls_show_the_usage() {
        for line in [
            "mount.fuse.fjord",
            "mount.fuse.fjord m:1",
            "mount.fuse.fjord m:1 /mnt -o",
            "mount.fuse.fjord m:1 /a /b",
            "mount.fuse.fjord m:1 /a -Q",
        ] {
            assert!(of(line).unwrap_err().contains("usage"), "{line}");
        }
    }
}
