//! Short failing sequences.

use super::Op;

/// Leaves out ever smaller parts of a failing sequence while what remains still fails, with at most `tries` runs.
pub fn shrink(ops: &[Op], tries: usize, mut fails: impl FnMut(&[Op]) -> bool) -> Vec<Op> {
    let mut best = ops.to_vec();
    let mut left = tries;
    let mut part = best.len().div_ceil(2);
    while part > 0 && left > 0 {
        let mut at = 0;
        let mut shorter = false;
        while at < best.len() && left > 0 {
            let end = (at + part).min(best.len());
            let candidate = [&best[..at], &best[end..]].concat();
            left -= 1;
            if fails(&candidate) {
                best = candidate;
                shorter = true;
            } else {
                at = end;
            }
        }
        if part == 1 && !shorter {
            break;
        }
        part = if part == 1 { 1 } else { part.div_ceil(2) };
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_matters_is_left() {
        let ops: Vec<Op> = (0..40).map(|slot| Op::Close { slot }).collect();
        let needs = |ops: &[Op]| [7, 31].iter().all(|s| ops.contains(&Op::Close { slot: *s }));
        assert_eq!(shrink(&ops, 500, needs), [Op::Close { slot: 7 }, Op::Close { slot: 31 }]);
    }
}
