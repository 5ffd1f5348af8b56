"""The table of polling.py: python3 -m unittest discover -s benches -p '*_test.py'."""
import unittest

import polling


def one_round(slow, gains):
    """Every figure of a mount that polls is so many times that of the one that does not."""
    figures = polling.FIGURES["null FUSE"]
    return {"null FUSE": {poll: {"rate": {f: slow * gain for f in figures}, "cpu": {f: 10 + poll for f in figures}}
                          for poll, gain in zip(polling.POLLS, gains)}}


class Table(unittest.TestCase):
    def test_gains_are_of_the_same_round(self):
        # A machine that is ten times as fast in one round changes no ratio.
        rounds = [one_round(1000, (1, 2, 3, 0.5)), one_round(10000, (1, 2, 3, 0.5)), one_round(2000, (1, 1, 5, 0.25))]
        lines = polling.table(rounds, "null FUSE").splitlines()
        self.assertEqual(lines[0], "| null FUSE | 0 µs | 20 µs | 50 µs | 100 µs |")
        stat = next(line for line in lines if line.startswith("| stat "))
        self.assertEqual(stat, "| stat | 2,000/s, 1.00 ×, 10 µs | 2,000/s, 2.00 ×, 30 µs | 10,000/s, 3.00 ×, 60 µs | 500/s, 0.50 ×, 110 µs |")
        self.assertEqual(len(lines), 2 + len(polling.FIGURES["null FUSE"]))


if __name__ == "__main__":
    unittest.main()
