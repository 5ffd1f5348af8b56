//! Dumps, damaged in every place, and written by others.

use super::*;
use crate::{
    backup::{
        frames,
        tests::{GO, backup_of},
    },
    testing::{World, run},
};

fn small_world() -> World {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(10));
    w.write(f, vec![run(0, 3 << 24, b, 0)]).unwrap();
    for i in 0..3 {
        w.file(&format!("file {i}"));
    }
    w
}

fn dump_of(backup: &[u8]) -> Vec<u8> {
    let mut lines = Vec::new();
    dump(backup, Path::new("b"), &GO, |piece| {
        lines.extend(piece);
        Ok(())
    })
    .unwrap();
    lines
}

fn pairs(dump: &[u8]) -> Result<(About, Vec<Pair>), String> {
    let mut pairs = Vec::new();
    let read = read(Path::new("d"), &mut &dump[..], |_, pair| {
        pairs.push(pair);
        Ok(())
    });
    read.map(|(about, _)| (about, pairs)).map_err(|e| e.to_string())
}

/// The dump with other lines: with an end that is theirs.
fn with_end(lines: &[&str]) -> Vec<u8> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let sha256 = hex(&Sha256::digest(&text));
    format!("{text}{{\"end\":{{\"lines\":{},\"sha256\":\"{sha256}\"}}}}\n", lines.len()).into_bytes()
}

fn without_checksum(line: &str) -> String {
    let (text, crc) = line.rsplit_once(r#","crc32c":""#).unwrap();
    assert_eq!(crc.len(), CRC_DIGITS + CRC_END.len());
    format!("{text}}}")
}

#[test]
fn a_dump_has_what_its_backup_has() {
    let w = small_world();
    let backup = backup_of(&*w.store, 7);
    let mut before = Vec::new();
    let source = &mut &backup[..];
    let (about, records) = frames::read(Path::new("b"), source, |_, pair| {
        before.push(pair);
        Ok(())
    })
    .unwrap();
    let dump = dump_of(&backup);
    assert_eq!(pairs(&dump).unwrap(), (about, before));
    let text = String::from_utf8(dump).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len() as u64, records + 2);
    let head = r#"{"format":"fjord-meta-dump","version":1,"records":2,"cluster_id":"cluster","created":7,"counters":{"#;
    assert!(lines[0].starts_with(head), "{}", lines[0]);
    let header: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
    let counters = lines.iter().find(|line| line.contains(r#""table":"counters""#)).unwrap();
    let counters: serde_json::Value = serde_json::from_str(counters).unwrap();
    assert_eq!(header["counters"], counters["record"]);
    assert!(!text.contains(r#""table":"other""#), "what the service stores is written as it would be read");
}

#[test]
fn a_store_without_anything_is_a_dump_of_two_lines() {
    let dump = dump_of(&backup_of(&crate::store::MemoryStore::default(), 7));
    let (about, pairs) = pairs(&dump).unwrap();
    assert_eq!((about.counters, pairs.len()), (None, 0));
    assert_eq!(dump.iter().filter(|byte| **byte == b'\n').count(), 2);
}

#[test]
fn whatever_is_damaged_is_told_with_its_line() {
    let good = dump_of(&backup_of(&*small_world().store, 7));
    let mut line = 1;
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        let said = pairs(&bad).unwrap_err();
        let is_told = said.starts_with(&format!("dump d: line {line} ")) && said.contains("anew");
        // What does not begin as a dump is none.
        assert!(
            is_told || at < BEGIN.len() && said.contains("is not a dump"),
            "byte {at}, line {line}: {said}"
        );
        line += u64::from(good[at] == b'\n');
    }
    for length in 0..good.len() {
        let said = pairs(&good[..length]).unwrap_err();
        let line = 1 + good[..length].iter().filter(|byte| **byte == b'\n').count();
        let is_told =
            said.contains(&format!("line {line} ")) && (length == 0 || said.contains("not complete"));
        assert!(is_told || line == 1 && said.contains("is not a dump"), "{length} bytes: {said}");
    }
    let behind: Vec<u8> = good.iter().copied().chain(*b"\n").collect();
    assert!(pairs(&behind).unwrap_err().contains("something behind it"));
}

#[test]
fn lines_that_are_missing_or_elsewhere_are_told() {
    let good = String::from_utf8(dump_of(&backup_of(&*small_world().store, 7))).unwrap();
    let lines: Vec<&str> = good.lines().collect();
    let said = |lines: &[&str]| {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        pairs(text.as_bytes()).unwrap_err()
    };
    let last = lines.len();
    let mut missing = lines.clone();
    missing.remove(4);
    let told = said(&missing);
    assert!(told.contains(&format!("line {} says that there are {} lines", last - 1, last - 1)), "{told}");
    let mut swapped = lines.clone();
    swapped.swap(4, 5);
    assert!(said(&swapped).contains("line 6 is out of order"));
    let mut twice = lines.clone();
    twice.insert(4, lines[3]);
    assert!(said(&twice).contains("line 5 is out of order"));
    let mut second = lines.clone();
    second.insert(1, lines[0]);
    assert!(said(&second).contains("line 2 cannot be read"));
    assert!(said(&lines[..last - 1]).contains(&format!("line {last} is missing")));
    // A line of another dump, with a checksum that is right.
    let other = String::from_utf8(dump_of(&backup_of(&*small_world().store, 8))).unwrap();
    let mut foreign = lines.clone();
    foreign[0] = other.lines().next().unwrap();
    assert!(said(&foreign).contains(&format!("line {last} has another SHA-256")));
}

#[test]
fn others_need_not_write_checksums_of_lines_but_the_sum_of_all() {
    let good = dump_of(&backup_of(&*small_world().store, 7));
    let text = String::from_utf8(good.clone()).unwrap();
    let bare: Vec<String> = text.lines().map(without_checksum).collect();
    let mut bare: Vec<&str> = bare.iter().map(String::as_str).collect();
    bare.pop();
    let theirs = with_end(&bare);
    assert_eq!(pairs(&theirs), pairs(&good));
    let changed = String::from_utf8(theirs).unwrap().replacen(r#""nlink":1"#, r#""nlink":2"#, 1);
    let said = pairs(changed.as_bytes()).unwrap_err();
    assert!(said.contains(&format!("line {} has another SHA-256", bare.len() + 1)), "{said}");
}

#[test]
fn what_a_line_must_not_have_is_told_with_its_number() {
    let header = r#"{"format":"fjord-meta-dump","version":1,"records":2,"cluster_id":"c","created":7}"#;
    for (line, why) in [
        ("", "line 2 cannot be read"),
        ("{}", "line 2 has neither"),
        (r#"{"table":"map","key":{}}"#, "line 2 has neither"),
        (r#"{"table":"map","key":{},"record":{},"more":1}"#, "line 2 cannot be read: unknown field `more`"),
        (r#"{"table":"maps","key":{},"record":{}}"#, "line 2 cannot be read: there is no table 'maps'"),
        (r#"{"table":"other","key":{"bytes":"AAA="},"record":{}}"#, "line 2 is out of order"),
    ] {
        let said = pairs(&with_end(&[header, line])).unwrap_err();
        assert!(said.contains(why), "{line}: {said}");
    }
    let newer = header.replace(r#""version":1"#, r#""version":2,"new":1"#);
    assert!(pairs(&with_end(&[&newer])).unwrap_err().contains("newer release"));
    let newer = header.replace(r#""records":2"#, r#""records":99"#);
    assert!(pairs(&with_end(&[&newer])).unwrap_err().contains("newer release"));
    let lacking = header.replace(r#","created":7"#, "");
    assert!(
        pairs(&with_end(&[&lacking])).unwrap_err().contains("line 1 cannot be read: missing field `created`")
    );
    assert!(pairs(&with_end(&[header])).is_ok());
}

#[test]
fn something_else_is_not_a_dump() {
    let backup = backup_of(&*small_world().store, 7);
    for other in [&backup[..], b"hello\nworld\n", b"{\"format\":\"else\"}\n", b"{}\n", b"[1]\n"] {
        assert!(pairs(other).unwrap_err().contains("d is not a dump of metadata; `fjord meta restore`"));
    }
    let dump = dump_of(&backup);
    let said = frames::read(Path::new("d"), &mut &dump[..], |_, _| Ok(())).unwrap_err().to_string();
    assert!(said.contains("d is not a backup of metadata; `fjord meta load`"), "{said}");
}

#[test]
fn who_stops_or_refuses_ends_a_dump() {
    let backup = backup_of(&*small_world().store, 7);
    let stopped = dump(&backup[..], Path::new("b"), &AtomicBool::new(true), |_| Ok(()));
    assert!(matches!(stopped, Err(BackupError::Stopped)));
    let refused = dump(&backup[..], Path::new("b"), &GO, |_| Err(BackupError::Interrupted("it".into())));
    assert!(matches!(refused, Err(BackupError::Interrupted(_))));
    let torn = dump(&backup[..backup.len() - 1], Path::new("b"), &GO, |_| Ok(()));
    assert!(torn.unwrap_err().to_string().starts_with("backup b: it ends in frame"));
}
