use super::*;

fn free(pool: &Pool) -> (usize, usize, usize) {
    let slots = pool.0.slots.lock();
    (slots.arena.len(), slots.warm.len(), slots.cold.len())
}

#[test]
fn memory_begins_on_a_page_and_slots_come_back() {
    let pool = Pool::new(21 << 20, 0);
    assert_eq!(pool.arena().unwrap().iovec().iov_len, 20 << 20, "whole huge pages");
    assert_eq!(free(&pool), (20, 0, 0));
    for len in [1, PAGE_SIZE, 3 * PAGE_SIZE + 1, SLOT, SLOT + 1] {
        let mut pages = pool.take(len);
        assert_eq!((pages.as_mut_ptr() as usize % PAGE_SIZE, pages.as_ref().len()), (0, len));
        assert_eq!(pages.is_registered(), len <= SLOT);
    }
    let mut many: Vec<Pages> = (0..25).map(|_| pool.take(SLOT)).collect();
    assert_eq!(many.iter().filter(|pages| pages.is_registered()).count(), 20);
    for (i, pages) in many.iter_mut().enumerate() {
        pages.as_mut().fill(i as u8);
    }
    assert!(many.iter().enumerate().all(|(i, pages)| pages.as_ref().iter().all(|byte| *byte == i as u8)));
    many[0].cut(7);
    assert_eq!((many[0].len(), many[0].as_ref().len()), (7, 7));
    drop(many);
    assert_eq!(free(&pool), (20, 0, 0));
    let tiny = Pool::new(1000, 0);
    assert!(tiny.arena().is_none_or(|arena| arena.iovec().iov_len == 0), "too little for an arena");
    assert!(!tiny.take(1).is_registered());
}

#[test]
fn what_is_kept_leaves_room_for_small_reads_and_idle_slots_give_their_memory_back() {
    let pool = Pool::new(16 << 20, SLAB as u64);
    pool.arena().unwrap();
    let mut kept: Vec<Pages> = (0..SLAB / SLOT + 8).map(|_| pool.take(SLOT)).collect();
    assert_eq!(kept.iter().filter(|pages| pages.is_registered()).count(), 8);
    let small = pool.take(PAGE_SIZE);
    assert!(small.is_registered());
    assert_eq!(free(&pool), (7, 0, 0));
    for pages in &mut kept {
        pages.as_mut().fill(7);
    }
    let (first, second) = (kept.pop().unwrap(), kept.pop().unwrap());
    let (first_start, second_start) = (first.as_ref().as_ptr(), second.as_ref().as_ptr());
    drop(first);
    drop(second);
    assert_eq!(pool.take(LARGE).as_ref().as_ptr(), second_start, "the last one first");
    assert_ne!(first_start, second_start);
    drop(kept);
    assert_eq!(free(&pool), (15, 16, SLAB / SLOT - 16), "as many as the arena has stay warm");
    let all: Vec<Pages> = (0..SLAB / SLOT).map(|_| pool.take(SLOT)).collect();
    let zeros = all.iter().filter(|pages| pages.as_ref().iter().all(|byte| *byte == 0)).count();
    assert!(zeros >= SLAB / SLOT - 16 - 7, "{zeros} came back as zeros");
}

#[test]
fn memory_outlives_the_pool() {
    let pool = Pool::new(0, SLAB as u64);
    let mut pages = pool.take(SLOT);
    drop(pool);
    pages.as_mut().fill(3);
    assert!(pages.as_ref().iter().all(|byte| *byte == 3));
}

#[test]
fn what_was_filled_is_what_is_shown() {
    let pool = Pool::new(0, SLAB as u64);
    for len in [0, 10, LARGE - 1, LARGE, SLOT, 3 * SLOT] {
        let mut filling = Filling::new(&pool, len);
        assert_eq!((filling.room().len(), filling.filled), (len, 0));
        let step = len / 2;
        filling.room()[..step].fill(1);
        filling.advance(step);
        assert_eq!(filling.room().len(), len - step);
        filling.advance(usize::MAX);
        assert_eq!((filling.filled, filling.room().len()), (len, 0));
        let bytes = filling.freeze();
        assert_eq!(bytes.len(), len);
        assert!(bytes[..step].iter().all(|byte| *byte == 1));
    }
    let mut cut = Filling::new(&pool, SLOT);
    cut.advance(5);
    assert_eq!(cut.freeze().len(), 5);
}
