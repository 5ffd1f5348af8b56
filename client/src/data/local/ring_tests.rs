use std::io::Write;

use super::*;
use crate::data::memory::Pool;

fn file_of(bytes: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(file)
}

#[tokio::test]
async fn what_is_read_is_what_the_file_has() {
    let pool = Pool::new(4 << 20, 0);
    let ring = Ring::new(true, pool.arena()).unwrap();
    assert!(ring.arena.is_some());
    let driver = tokio::spawn(Arc::clone(&ring).drive());
    let bytes: Vec<u8> = (0..3 * 4096u32).map(|i| (i % 251) as u8).collect();
    let file = file_of(&bytes);
    // More than the ring has entries, and the pool slots.
    let many = (0..3 * ENTRIES as usize).map(|i| {
        let (file, pages) = (file.clone(), pool.take(4096));
        let offset = 4096 * (i % 3);
        let reading = ring.read(file, offset as u64, pages);
        let bytes = &bytes;
        async move { assert_eq!(reading.await.unwrap().as_ref(), &bytes[offset..offset + 4096]) }
    });
    futures_util::future::join_all(many).await;
    let short = ring.read(file.clone(), 2 * 4096, pool.take(3 * 4096)).await.unwrap();
    assert_eq!(short.as_ref(), &bytes[2 * 4096..]);
    let folder = Arc::new(File::open("/").unwrap());
    let error = ring.read(folder, 0, pool.take(1)).await.err().unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EISDIR));
    ring.close();
    driver.await.unwrap();
    assert!(ring.operations.lock().is_empty());
    let error = ring.read(file, 0, pool.take(1)).await.err().unwrap();
    assert!(error.to_string().contains("shut down"), "{error}");
}

#[tokio::test]
async fn abandoned_reads_keep_their_memory_until_they_are_done() {
    let pool = Pool::new(4 << 20, 0);
    let ring = Ring::new(true, pool.arena()).unwrap();
    let file = file_of(&[7; 1 << 20]);
    for _ in 0..8 {
        drop(ring.read(file.clone(), 0, pool.take(1 << 20)));
    }
    assert_eq!(Arc::strong_count(&file), 9, "the ring still needs it");
    // Waits for what is under way.
    drop(ring);
    assert_eq!(Arc::strong_count(&file), 1);
}
