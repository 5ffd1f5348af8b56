//! Compiles schema/*.proto with protox (no protoc needed) into OUT_DIR: the part of etcd's API that the store uses, and the records of
//! the store, with their description, by which dumps are written and read.

use std::{env, fs, path::Path};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=schema");
    println!("cargo:rerun-if-changed=../proto/schema");
    let etcd = protox::compile(["schema/etcd.proto"], ["schema"])?;
    tonic_prost_build::configure().bytes(".").build_server(false).compile_fds(etcd)?;

    let mut records = protox::Compiler::new(["schema", "../proto/schema"])?;
    records.include_imports(true).open_files(["schema/records.proto"])?;
    let out = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    fs::write(Path::new(&out).join("records.bin"), records.file_descriptor_set().encode_to_vec())?;
    // With what the code is commented by.
    records.include_source_info(true);
    let mut code = tonic_prost_build::configure().build_server(false).build_client(false);
    for message in ["Inode", "ExtentRecord", "SlotRecord"] {
        code = code.bytes(format!(".fjordfs.store.v1.{message}"));
    }
    // These are in fjordfs-proto.
    for package in ["common", "meta"] {
        code =
            code.extern_path(format!(".fjordfs.{package}.v1"), format!("::fjordfs_proto::pb::{package}::v1"));
    }
    code.compile_fds(records.file_descriptor_set())?;
    Ok(())
}
