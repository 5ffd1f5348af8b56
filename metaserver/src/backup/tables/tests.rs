//! Whatever a store holds comes back from JSON byte for byte. What there may be is taken from the schema, so no field is forgotten here.

use std::collections::BTreeSet;

use proptest::{collection::vec, option, prelude::*};

use super::*;

/// Any value of a field of this kind.
fn value(kind: Kind) -> BoxedStrategy<Value> {
    match kind {
        Kind::Uint64 => prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)].prop_map(Value::U64).boxed(),
        Kind::Uint32 | Kind::Fixed32 => prop_oneof![any::<u32>(), Just(0)].prop_map(Value::U32).boxed(),
        Kind::Sfixed64 => prop_oneof![any::<i64>(), Just(i64::MIN)].prop_map(Value::I64).boxed(),
        Kind::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        Kind::String => any::<String>().prop_map(Value::String).boxed(),
        Kind::Bytes => vec(any::<u8>(), 0..40).prop_map(|bytes| Value::Bytes(bytes.into())).boxed(),
        // Also those that a later release may know.
        Kind::Enum(_) => prop_oneof![0..9, any::<i32>()].prop_map(Value::EnumNumber).boxed(),
        Kind::Message(description) => message(&description).prop_map(Value::Message).boxed(),
        other => panic!("{other:?} is new in the schema: say here what there may be of it"),
    }
}

/// Any message; each of its fields may be absent.
fn message(description: &MessageDescriptor) -> BoxedStrategy<DynamicMessage> {
    let field = |field: prost_reflect::FieldDescriptor| {
        assert!(!field.is_map() && field.containing_oneof().is_none(), "{}: as above", field.full_name());
        let of = match field.is_list() {
            true => vec(value(field.kind()), 0..4).prop_map(Value::List).boxed(),
            false => value(field.kind()),
        };
        option::of(of).prop_map(move |value| (field.clone(), value))
    };
    let description = description.clone();
    let fields: Vec<_> = description.fields().map(field).collect();
    fields
        .prop_map(move |fields| {
            let mut message = DynamicMessage::new(description.clone());
            for (field, value) in fields {
                if let Some(value) = value {
                    message.set_field(&field, value);
                }
            }
            message
        })
        .boxed()
}

fn packed(message: &DynamicMessage) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(message, &mut bytes);
    bytes
}

/// Any record of a table.
fn record(described: &'static Described) -> impl Strategy<Value = Pair> {
    (message(&described.key), message(&described.value)).prop_map(|(key, value)| {
        let key = described.table.prefix.into_iter().chain(packed(&key)).collect();
        let value = match described.table.coding {
            Coding::Protobuf(_) => value.encode_to_vec(),
            Coding::Fields => packed(&value),
        };
        (key, value.into())
    })
}

/// The name of the table, and any record of it.
fn any_record() -> impl Strategy<Value = (&'static str, Pair)> {
    proptest::sample::select((0..TABLES.len() - 1).collect::<Vec<_>>())
        .prop_flat_map(|n| record(&DESCRIBED[n]).prop_map(move |pair| (TABLES[n].name, pair)))
}

/// Records that are not what a table would have.
fn any_bytes() -> impl Strategy<Value = Pair> {
    let key = (prop_oneof![b'A'..=b'Z', 1..0xffu8], vec(any::<u8>(), 0..30));
    let key = key.prop_map(|(first, rest)| [vec![first], rest].concat());
    (
        key.prop_filter("a store says by it that it is closed", |key| key != keys::CLOSED),
        vec(any::<u8>(), 0..30),
    )
        .prop_map(|(key, value)| (key, value.into()))
}

/// What a store may hold, and what it should not.
pub(in crate::backup) fn any_pair() -> impl Strategy<Value = Pair> {
    prop_oneof![9 => any_record().prop_map(|(_, pair)| pair), 1 => any_bytes()]
}

fn line((key, value): &Pair) -> String {
    let mut line = b"{".to_vec();
    to_json(key, value, &mut line).unwrap();
    line.push(b'}');
    String::from_utf8(line).unwrap()
}

fn back(line: &str) -> Result<Pair, String> {
    #[derive(serde::Deserialize)]
    struct Line<'a> {
        table: &'a str,
        #[serde(borrow)]
        key: &'a RawValue,
        #[serde(borrow)]
        record: &'a RawValue,
    }
    let line: Line<'_> = serde_json::from_str(line).unwrap();
    from_json(line.table, line.key, line.record)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_record_of_any_table_comes_back((table, pair) in any_record()) {
        let line = line(&pair);
        prop_assert!(line.starts_with(&format!(r#"{{"table":"{table}","#)), "{}", line);
        prop_assert_eq!(back(&line), Ok(pair), "{}", line);
    }

    #[test]
    fn whatever_else_is_stored_comes_back(pair in any_bytes()) {
        let line = line(&pair);
        prop_assert_eq!(back(&line), Ok(pair), "{}", line);
    }
}

#[test]
fn every_kind_of_record_has_a_table() {
    let listed = include_str!("../../keys.rs").lines().filter_map(|line| {
        let (_, prefix) = line.strip_prefix("pub(crate) const ")?.split_once(": u8 = b'")?;
        prefix.bytes().next()
    });
    let listed: Vec<u8> = listed.chain(keys::FORMAT.iter().copied()).collect();
    assert!(listed.len() >= 17, "{listed:?}");
    let shown: Vec<u8> = TABLES.iter().filter_map(|table| table.prefix).collect();
    let set = |prefixes: &[u8]| BTreeSet::from_iter(prefixes.to_owned());
    assert_eq!((set(&shown), shown.len()), (set(&listed), listed.len()));
    let names = BTreeSet::from_iter(TABLES.iter().map(|table| table.name));
    assert_eq!(names.len(), TABLES.len());
    // In a key, what has no fixed length is the last of it.
    for described in DESCRIBED.iter() {
        for message in [&described.key, &described.value] {
            let bytes = message.fields().position(|field| field.kind() == Kind::Bytes);
            let is_packed = matches!(described.table.coding, Coding::Fields) || message == &described.key;
            assert!(!is_packed || bytes.is_none_or(|n| n + 1 == message.fields().len()), "{message:?}");
        }
    }
}

#[test]
fn every_message_of_the_schema_is_in_a_table() {
    let mut reached = BTreeSet::new();
    let mut next: Vec<_> = DESCRIBED.iter().flat_map(|d| [d.key.clone(), d.value.clone()]).collect();
    while let Some(message) = next.pop() {
        if reached.insert(message.full_name().to_owned()) {
            next.extend(message.fields().filter_map(|field| field.kind().as_message().cloned()));
        }
    }
    let pool = DESCRIBED[0].key.parent_pool();
    for message in pool.all_messages().filter(|message| message.package_name() == PACKAGE) {
        assert!(reached.contains(message.full_name()), "{} is in no table", message.full_name());
    }
    assert!(reached.contains("fjordfs.common.v1.Move") && reached.contains("fjordfs.meta.v1.Time"));
}

/// What has been written so once is read so for ever.
#[test]
fn records_are_shown_so() {
    use fjordfs_proto::{InodeId, SessionId, TargetId, pb::meta::Time};
    let inode = Inode {
        kind: 2,
        mode: 0o755,
        size: 1 << 60,
        mtime: Some(Time { sec: -1, nsec: 5 }),
        name: Bytes::from_static(b"caf\xe9"),
        unnamed: true,
        ..Inode::default()
    };
    let map = ClusterMap {
        cluster_id: "c".into(),
        targets: vec![fjordfs_proto::pb::common::Target { id: 3, state: 4, ..Default::default() }],
        ..ClusterMap::default()
    };
    for (pair, shown) in [
        (
            (keys::inode(InodeId(7)), inode.encode_to_vec()),
            r#"{"table":"inode","key":{"ino":"7"},"record":{"kind":"FILE_KIND_DIRECTORY","mode":493,"size":"1152921504606846976","mtime":{"sec":"-1","nsec":5},"name":"Y2Fm6Q==","unnamed":true}}"#,
        ),
        (
            (keys::dirent(InodeId(1), b"a"), Dirent { ino: 7, kind: 1 }.encode_to_vec()),
            r#"{"table":"dirent","key":{"parent":"1","cookie":"8314517215945369359","name":"YQ=="},"record":{"ino":"7","kind":"FILE_KIND_REGULAR"}}"#,
        ),
        (
            (keys::xattr(InodeId(7), b"user.x"), b"\0\xff".to_vec()),
            r#"{"table":"xattr","key":{"ino":"7","name":"dXNlci54"},"record":{"value":"AP8="}}"#,
        ),
        (
            (keys::slot(SessionId(2), 0), Vec::new()),
            r#"{"table":"slot","key":{"session":"2","slot":0},"record":{}}"#,
        ),
        ((keys::target(TargetId(3)), Vec::new()), r#"{"table":"target","key":{"target":"3"},"record":{}}"#),
        (
            (vec![keys::MAP], map.encode_to_vec()),
            r#"{"table":"map","key":{},"record":{"cluster_id":"c","targets":[{"id":"3","state":"TARGET_STATE_DRAINING"}]}}"#,
        ),
        ((keys::FORMAT.to_vec(), vec![0, 0, 0, 2]), r#"{"table":"format","key":{},"record":{"version":2}}"#),
        ((keys::orphan(InodeId(9)), Vec::new()), r#"{"table":"orphan","key":{"ino":"9"},"record":{}}"#),
        (
            (keys::orphan(InodeId(9)), vec![1]),
            r#"{"table":"other","key":{"bytes":"TwAAAAAAAAAJ"},"record":{"bytes":"AQ=="}}"#,
        ),
        // A field that this release does not know.
        (
            (keys::inode(InodeId(7)), vec![0xf8, 1, 1]),
            r#"{"table":"other","key":{"bytes":"QQAAAAAAAAAH"},"record":{"bytes":"+AEB"}}"#,
        ),
    ] {
        let pair = (pair.0, Bytes::from(pair.1));
        assert_eq!(line(&pair), shown);
        assert_eq!(back(shown), Ok(pair));
    }
}

/// Other programs may write a line as protobuf's JSON allows.
#[test]
fn a_line_may_be_written_otherwise() {
    let usual =
        r#"{"table":"inode","key":{"ino":"7"},"record":{"kind":"FILE_KIND_REGULAR","data_version":"3"}}"#;
    let other =
        r#"{ "record": {"dataVersion": 3, "kind": 1, "mode": 0}, "table": "inode", "key": {"ino": 7} }"#;
    assert_eq!(back(other), back(usual));
}

#[test]
fn what_a_line_cannot_mean_is_told() {
    for (line, why) in [
        (r#"{"table":"inodes","key":{},"record":{}}"#, "there is no table 'inodes'"),
        (r#"{"table":"inode","key":{"ino":"7"},"record":{"modus":1}}"#, "modus"),
        (r#"{"table":"inode","key":{"inode":"7"},"record":{}}"#, "inode"),
        (r#"{"table":"inode","key":{"ino":"-7"},"record":{}}"#, "its key is no InodeKey: invalid digit"),
        (r#"{"table":"inode","key":{"ino":"7"},"record":{"mode":4294967296}}"#, "its record is no Inode"),
        (r#"{"table":"inode","key":{"ino":"7"},"record":{"name":"*"}}"#, "its record is no Inode"),
        (r#"{"table":"inode","key":{"ino":"7"},"record":{"kind":"FILE_KIND_FOLDER"}}"#, "FILE_KIND_FOLDER"),
        (r#"{"table":"orphan","key":{"ino":"7"},"record":{"size":"1"}}"#, "size"),
    ] {
        let said = back(line).unwrap_err();
        assert!(said.contains(why), "{line}: {said}");
    }
}
