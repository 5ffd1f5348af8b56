//! Compiles schema/*.proto with protox (no protoc needed) into OUT_DIR.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=schema");
    let files = ["schema/common.proto", "schema/meta.proto", "schema/data.proto"];
    let descriptors = protox::compile(files, ["schema"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
