"""The arithmetic of result pages: python3 -m unittest discover -s benches -p '*_test.py'."""
import unittest

import workload_report as report

FJORD = {"meta_stat_t1_per_s": 30, "small_4k_ls_cold_secs": 0.2, "rand_4k_j1_warm": {"iops": 50, "p50_us": 20, "foreign": 0.0}, "cores": 2,
         "complete": True, "cpu": {"meta_stat_t1": {"wall": 1.0, "fjord-mount": "50%", "fsb": "90%"}}}
LOCAL = {"meta_stat_t1_per_s": 100, "small_4k_ls_cold_secs": 0.1}
NULLS = [{"meta_stat_t1_per_s": 40, "rand_4k_j1_warm": {"iops": 90}}, {"meta_stat_t1_per_s": 80, "rand_4k_j1_warm": {"iops": 110}}]


def rows(text):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


class Report(unittest.TestCase):
    def test_ratios_favour_the_first_for_rates_and_for_times(self):
        self.assertEqual(report.ratio("x_per_s", 30, 60), 0.5)
        self.assertEqual(report.ratio("x_secs", 30, 60), 2)
        self.assertIsNone(report.ratio("x_secs", 0, 60))
        self.assertIsNone(report.ratio("x_per_s", 30, None))

    def test_runs_of_the_floor_are_joined_by_figure(self):
        null = report.medians([*NULLS, {"meta_unlink_t1_per_s": 7}])
        self.assertEqual(null, {"meta_stat_t1_per_s": 60, "rand_4k_j1_warm_iops": 100, "meta_unlink_t1_per_s": 7})
        self.assertEqual(report.medians([]), {})

    def test_every_figure_stands_beside_its_floor(self):
        table = rows(report.table(FJORD, report.figures(LOCAL), report.medians(NULLS)))
        stat = table["meta_stat_t1_per_s"]
        self.assertEqual([stat[c] for c in ("FjordFS", "local ext4", "null FUSE")], ["30", "100", "60"])
        self.assertEqual([stat[c] for c in ("FjordFS ÷ local", "FjordFS ÷ null", "null ÷ local")], ["0.300", "0.500", "0.600"])
        self.assertEqual((stat["what counts"], stat["issue 3"]), ("0.300 × local (100)", "0.50 **missed**"))
        self.assertEqual(stat["CPU"], "client 16,667 µs")
        ls = table["small_4k_ls_cold_secs"]
        self.assertEqual((ls["FjordFS ÷ local"], ls["FjordFS ÷ null"], ls["null ÷ local"]), ("0.500", "-", "-"))
        read = table["rand_4k_j1_warm_iops"]
        self.assertEqual((read["FjordFS ÷ null"], read["what counts"], read["issue 3"]), ("0.500", "0.500 × null FUSE (100)", "0.60 **missed**"))
        self.assertNotIn("cores", table)


if __name__ == "__main__":
    unittest.main()
