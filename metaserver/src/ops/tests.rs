//! Operations on the engine in memory; after each test the checker scans everything.

mod accesses;
mod acls;
mod allocations;
mod commits;
mod copies;
mod model;
mod names;
mod renames;
mod xattrs;
