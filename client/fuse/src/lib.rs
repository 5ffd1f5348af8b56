//! FjordFS.
