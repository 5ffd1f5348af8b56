//! Inputs for unit tests of what the fuzzer drives: the corpus of a target, and what is like it. Part of each crate that has a target.

use std::path::Path;

use proptest::{collection::vec, prelude::*, sample};

/// The corpus, in the order of its files' names.
pub(crate) fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = format!("tests/fuzz/corpus/{target}");
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|at| at.join(&folder)).find(|at| at.exists());
    let files = std::fs::read_dir(folder.unwrap()).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// What the fuzzer makes of it, without its eyes.
pub(crate) fn like(corpus: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edits = vec((any::<sample::Index>(), any::<u8>()), 0..8);
    (sample::select(corpus), vec(any::<u8>(), 0..40), edits).prop_map(|(mut input, more, edits)| {
        input.extend(more);
        for (at, byte) in edits {
            let at = at.index(input.len().max(1));
            if let Some(place) = input.get_mut(at) {
                *place = byte;
            }
        }
        input
    })
}
