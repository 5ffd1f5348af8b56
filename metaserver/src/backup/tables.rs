//! The tables of the store, as a dump shows them: keys and values as protobuf messages of `schema/records.proto`, by its description.
//!
//! What a dump could not bring back byte for byte (a key of no table, a value that this release would write otherwise) is shown as it is
//! stored, in the table [`OTHER`]: a dump loses nothing, also of what is damaged.

use std::sync::LazyLock;

use bytes::Bytes;
use fjordfs_proto::pb::common::ClusterMap;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, ReflectMessage,
    SerializeOptions, Value,
};
use serde_json::value::RawValue;

use crate::{
    keys,
    records::{
        Counters, DeadRun, Dirent, ExtentRecord, Inode, LeasedRange, LiveBlock, SessionRecord, SlotRecord,
        TargetRecord,
    },
    store::Pair,
};

/// Its keys and values are bytes as they are stored.
pub(super) const OTHER: &str = "other";

const PACKAGE: &str = "fjordfs.store.v1";
const MAP: &str = "fjordfs.common.v1.ClusterMap";

/// How a message is bytes.
#[derive(Clone, Copy)]
enum Coding {
    /// As protobuf. The function says whether it would write the same bytes.
    Protobuf(fn(&[u8]) -> bool),
    /// One field behind the other, big-endian, as in keys.
    Fields,
}

/// A kind of records.
struct Table {
    name: &'static str,
    /// First byte of its keys; `None`: there is none.
    prefix: Option<u8>,
    /// Messages of the schema.
    key: &'static str,
    value: &'static str,
    coding: Coding,
}

const fn stored<M: Message + Default>(
    prefix: u8,
    name: &'static str,
    key: &'static str,
    value: &'static str,
) -> Table {
    Table { name, prefix: Some(prefix), key, value, coding: Coding::Protobuf(is_written_so::<M>) }
}

const fn plain(prefix: u8, name: &'static str, key: &'static str, value: &'static str) -> Table {
    Table { name, prefix: Some(prefix), key, value, coding: Coding::Fields }
}

/// All there are, as `keys.rs` lists them.
const TABLES: &[Table] = &[
    stored::<Inode>(keys::INODE, "inode", "InodeKey", "Inode"),
    stored::<Dirent>(keys::DIRENT, "dirent", "DirentKey", "Dirent"),
    stored::<ExtentRecord>(keys::EXTENT, "extent", "ExtentKey", "ExtentRecord"),
    plain(keys::XATTR, "xattr", "XattrKey", "Xattr"),
    stored::<LiveBlock>(keys::LIVE, "live_block", "BlockKey", "LiveBlock"),
    stored::<LeasedRange>(keys::RANGE, "leased_range", "LeasedRangeKey", "LeasedRange"),
    stored::<DeadRun>(keys::DEAD, "dead_run", "BlockKey", "DeadRun"),
    plain(keys::DELETE, "deletion", "DeletionKey", "NoValue"),
    plain(keys::ORPHAN, "orphan", "InodeKey", "NoValue"),
    plain(keys::DESTROY, "destroyed", "InodeKey", "NoValue"),
    stored::<SessionRecord>(keys::SESSION, "session", "SessionKey", "SessionRecord"),
    stored::<SlotRecord>(keys::SLOT, "slot", "SlotKey", "SlotRecord"),
    stored::<Counters>(keys::COUNTERS, "counters", "NoKey", "Counters"),
    stored::<ClusterMap>(keys::MAP, "map", "NoKey", MAP),
    stored::<TargetRecord>(keys::TARGET, "target", "TargetKey", "TargetRecord"),
    plain(keys::WIDTH, "width", "WidthKey", "NoValue"),
    plain(keys::FORMAT[0], "format", "NoKey", "Format"),
    Table { name: OTHER, prefix: None, key: "Stored", value: "Stored", coding: Coding::Fields },
];

/// A table with the descriptions of its messages.
struct Described {
    table: &'static Table,
    key: MessageDescriptor,
    value: MessageDescriptor,
}

static DESCRIBED: LazyLock<Vec<Described>> = LazyLock::new(|| {
    let schema = include_bytes!(concat!(env!("OUT_DIR"), "/records.bin"));
    let pool = DescriptorPool::decode(&schema[..]).expect("the build has written it");
    let message = |name: &str| {
        let full = if name.contains('.') { name.to_owned() } else { format!("{PACKAGE}.{name}") };
        pool.get_message_by_name(&full).expect("a test looks at every table")
    };
    let described =
        |table: &'static Table| Described { table, key: message(table.key), value: message(table.value) };
    TABLES.iter().map(described).collect()
});

fn is_written_so<M: Message + Default>(bytes: &[u8]) -> bool {
    M::decode(bytes).is_ok_and(|message| message.encode_to_vec() == bytes)
}

// ---- messages whose fields stand one behind the other ----

fn unpack(description: &MessageDescriptor, mut bytes: &[u8]) -> Option<DynamicMessage> {
    let mut message = DynamicMessage::new(description.clone());
    for field in description.fields() {
        let value = match field.kind() {
            Kind::Uint64 => Value::U64(u64::from_be_bytes(*bytes.split_off(..8)?.as_array()?)),
            Kind::Uint32 => Value::U32(u32::from_be_bytes(*bytes.split_off(..4)?.as_array()?)),
            Kind::Bytes => Value::Bytes(Bytes::copy_from_slice(std::mem::take(&mut bytes))),
            _ => return None,
        };
        message.set_field(&field, value);
    }
    bytes.is_empty().then_some(message)
}

fn pack(message: &DynamicMessage, into: &mut Vec<u8>) {
    for field in message.descriptor().fields() {
        match &*message.get_field(&field) {
            Value::U64(number) => into.extend(number.to_be_bytes()),
            Value::U32(number) => into.extend(number.to_be_bytes()),
            Value::Bytes(bytes) => into.extend(bytes),
            _ => {}
        }
    }
}

// ---- records as JSON and back ----

impl Described {
    fn decode(&self, key: &[u8], value: &[u8]) -> Option<(DynamicMessage, DynamicMessage)> {
        let key = match self.table.prefix {
            Some(prefix) => unpack(&self.key, key.strip_prefix(&[prefix])?)?,
            None => unpack(&self.key, key)?,
        };
        let value = match self.table.coding {
            Coding::Fields => unpack(&self.value, value)?,
            Coding::Protobuf(is_written_so) => is_written_so(value)
                .then(|| DynamicMessage::decode(self.value.clone(), value).ok())
                .flatten()?,
        };
        Some((key, value))
    }

    fn options(&self) -> SerializeOptions {
        // Protobuf leaves out what is as it is by default; of what has few fields all are there.
        let leave_out = matches!(self.table.coding, Coding::Protobuf(_));
        SerializeOptions::new().use_proto_field_name(true).skip_default_fields(leave_out)
    }
}

fn print(message: &DynamicMessage, options: &SerializeOptions, into: &mut Vec<u8>) -> serde_json::Result<()> {
    message.serialize_with_options(&mut serde_json::Serializer::new(into), options)
}

/// Appends the members `table`, `key` and `record` of a record's line.
pub(super) fn to_json(key: &[u8], value: &[u8], into: &mut Vec<u8>) -> serde_json::Result<()> {
    let known = DESCRIBED.iter().filter(|d| d.table.prefix.is_none_or(|prefix| key.first() == Some(&prefix)));
    for described in known {
        let Some((key, value)) = described.decode(key, value) else { continue };
        into.extend(format!(r#""table":"{}","key":"#, described.table.name).into_bytes());
        let all = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
        print(&key, &all, into)?;
        into.extend(br#","record":"#);
        return print(&value, &described.options(), into);
    }
    unreachable!("any bytes are a record of the table `{OTHER}`")
}

/// The record that a line has, or what is wrong with it.
pub(super) fn from_json(table: &str, key: &RawValue, record: &RawValue) -> Result<Pair, String> {
    let described = DESCRIBED.iter().find(|d| d.table.name == table);
    let described = described.ok_or_else(|| format!("there is no table '{table}'"))?;
    let parse = |what: &str, description: &MessageDescriptor, text: &RawValue| {
        let mut json = serde_json::Deserializer::from_str(text.get());
        let strict = DeserializeOptions::new().deny_unknown_fields(true);
        DynamicMessage::deserialize_with_options(description.clone(), &mut json, &strict)
            .map_err(|e| format!("its {what} is no {}: {}", description.name(), saying(&e)))
    };
    let (key, value) = (parse("key", &described.key, key)?, parse("record", &described.value, record)?);
    let mut stored = Vec::from_iter(described.table.prefix);
    pack(&key, &mut stored);
    let value = match described.table.coding {
        Coding::Protobuf(_) => value.encode_to_vec(),
        Coding::Fields => {
            let mut bytes = Vec::new();
            pack(&value, &mut bytes);
            bytes
        }
    };
    Ok((stored, value.into()))
}

/// What is wrong with a text, without its place in it: the text is a part of one line.
pub(super) fn saying(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(what, _)| what.to_owned())
}

/// The record of counters, as a line has it.
pub(super) fn counters(value: &[u8]) -> Option<serde_json::Value> {
    let described = DESCRIBED.iter().find(|d| d.table.prefix == Some(keys::COUNTERS))?;
    let (_, counters) = described.decode(&[keys::COUNTERS], value)?;
    counters.serialize_with_options(serde_json::value::Serializer, &described.options()).ok()
}

#[cfg(test)]
pub(super) mod tests;
