//! fjord
fn main() {}
