from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.evaluation import results as r

NAMES = ("T1", "T1ce", "T2", "FLAIR")


def table(**changes) -> pd.DataFrame:
    """Two cases with two subsets; ``changes`` replace the value of a column in the third row."""
    rows = [
        ("A", "MSTKDTrainer", 0, case, subset, subset.count("+") + 1, "ET", "dice", value)
        for case, subset, value in (
            ("00012", "T1", 1 / 3),
            ("00012", "T1+T1ce", 0.9),
            ("00013", "T1", 0.1 + 0.2),
            ("00013", "T1+T1ce", math.nan),
        )
    ]
    frame = pd.DataFrame(rows, columns=list(r.COLUMNS)).astype(object)
    for column, value in changes.items():
        frame.loc[2, column] = value
    return frame


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_all_digits(tmp_path):
    written = r.check_results(table(region="NA", model="null"))
    r.write_results(written, tmp_path / "deeper" / "results.csv")
    pd.testing.assert_frame_equal(r.read_results(tmp_path / "deeper" / "results.csv"), written, check_exact=True)
    assert (tmp_path / "deeper" / "results.csv").read_text().endswith(",dice,nan\n")
    assert written["case"].tolist() == ["00012", "00012", "00013", "00013"]
    assert written["region"][2] == "NA" and written["fold"].tolist() == ["0"] * 4


def test_columns_come_in_order_and_further_ones_are_kept(tmp_path):
    frame = table()
    frame.insert(0, "site", "X")
    r.write_results(frame[frame.columns[::-1]], tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == ",".join([*r.COLUMNS, "site"])
    assert r.read_results(tmp_path / "results.csv")["site"].tolist() == ["X"] * 4


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    r.write_results(table(), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(r.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        r.write_results(table(value=0.5), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_wrong_results_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="unknown metric"):
        r.write_results(table(metric="DSC"), tmp_path / "results.csv")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_missing_or_no_table_is_refused_by_name(tmp_path):
    path = tmp_path / "results.csv"
    with pytest.raises(FileNotFoundError, match=r"results.csv does not exist"):
        r.read_results(path)
    for content, message in (
        (b"", "not a table"),
        (b"\x89PNG\xff\xfe", "not a table"),
        (b'a,b\n"1', "not a table"),
        (b"model,case\nA,1\n", "no column trainer, fold"),
        (b"model;case\nA;1\n", "one column, 'model;case'; separate columns by commas"),
        (b"", "not a table"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"results.csv.*{message}"):
            r.read_results(path)


# ---- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"case": ""}, r"row 3 has no case"),
        ({"model": None}, r"row 3 has no model"),
        ({"modalities": 2}, r"row 3 has a number of modalities other than its subset \(model=A"),
        ({"modalities": "one"}, "row 3 has a modalities that is not a number"),
        ({"modalities": None}, "row 3 has a number of modalities other than its subset"),
        ({"value": "0,5"}, "row 3 has a value that is not a number"),
        ({"value": 90.0}, r"row 3 has a value outside 0 ... 1"),
        ({"value": -0.1}, r"row 3 has a value outside 0 ... 1"),
        ({"value": math.inf, "metric": "hd95"}, r"row 3 has a value outside 0 ... inf"),
        ({"metric": "DSC"}, "unknown metric 'DSC'; known are dice"),
        ({"subset": "T1+"}, r"subset 'T1\+' is not a list of different modalities"),
        ({"subset": "T1+T1", "modalities": 2}, "not a list of different modalities"),
        ({"subset": "T1ce+T1", "modalities": 2}, r"'T1\+T1ce' is also written 'T1ce\+T1'"),
        ({"case": "00012"}, r"row 3 appears twice"),
    ],
)
def test_a_wrong_row_is_refused_with_its_number(changes, message):
    with pytest.raises(ValueError, match=message):
        r.check_results(table(**changes))


def test_several_wrong_rows_are_counted():
    frame = table()
    frame["value"] = 7
    with pytest.raises(ValueError, match=r"row 1 has a value outside.* and 3 more"):
        r.check_results(frame)


def test_missing_columns_and_rows_are_refused():
    with pytest.raises(ValueError, match="no column fold, value; expected are model"):
        r.check_results(table().drop(columns=["fold", "value"]))
    with pytest.raises(ValueError, match="no rows"):
        r.check_results(table()[:0])


def test_checking_does_not_change_what_was_given():
    frame = table(value="0.5")
    before = frame.copy()
    assert r.check_results(frame)["value"][2] == 0.5
    pd.testing.assert_frame_equal(frame, before)


# ---- orders and patients -------------------------------------------------------------------------------------------


def test_subsets_are_written_and_ordered_as_in_the_whole_package():
    assert r.SEPARATOR == modalities.SEPARATOR
    expected = [modalities.subset_name(row, NAMES) for row in modalities.all_subsets(4)]
    shuffled = [expected[i] for i in np.random.default_rng(0).permutation(len(expected))]
    assert r.modality_order(shuffled) == NAMES
    assert list(r.subset_order(shuffled, NAMES)) == expected


def test_a_subset_written_in_another_order_has_the_same_place():
    assert r.subset_order(["B+C", "C+A", "B+A"], "ABC") == ("B+A", "C+A", "B+C")


def test_modality_order_without_the_full_subset():
    assert r.modality_order(["C", "A+B", "B+C"]) == ("A", "B", "C")


def test_time_points_of_brats_belong_to_one_patient():
    cases = ["BraTS-GLI-00005-100", "BraTS-GLI-00005-101", "BraTS-MET-00005-000", "BraTS2021_00000", "case-1"]
    assert list(r.patients_of(pd.DataFrame({"case": cases})).values()) == [
        "BraTS-GLI-00005",
        "BraTS-GLI-00005",
        "BraTS-MET-00005",
        "BraTS2021_00000",
        "case-1",
    ]


def test_a_column_tells_the_patients_of_other_cases():
    frame = pd.DataFrame({"case": ["a1", "a2", "a1", "BraTS-GLI-00005-100"], "patient": ["a", "a", "a", np.nan]})
    assert r.patients_of(frame) == {"a1": "a", "a2": "a", "BraTS-GLI-00005-100": "BraTS-GLI-00005"}


def test_cases_without_a_patient_in_the_column_are_patients_of_their_own(tmp_path):
    frame = table()
    frame["patient"] = ["p", *[""] * (len(frame) - 1)]
    frame["case"] = [f"c{number}" for number in range(len(frame))]
    file = tmp_path / "results.csv"
    r.write_results(frame, file)
    assert r.patients_of(r.read_results(file)) == {"c0": "p"} | {case: case for case in frame["case"][1:]}
    r.write_results(r.read_results(file), file)
    assert r.patients_of(r.read_results(file))["c1"] == "c1"


def test_no_region_is_called_like_the_mean_over_regions(tmp_path):
    frame = table(region="average")
    r.write_results(frame, tmp_path / "results.csv")
    with pytest.raises(ValueError, match="region that is called like the mean"):
        r.read_results(tmp_path / "results.csv")


def test_a_case_has_one_patient():
    frame = pd.concat([table(), table(subset="T1")], ignore_index=True).drop_duplicates()
    frame["patient"] = "p"
    frame.loc[frame.index[-1], "patient"] = "q"
    with pytest.raises(ValueError, match="has a second patient"):
        r.check_results(frame)


def test_results_are_read_and_compared_without_pytorch():
    names = ["metrics.lesionwise", "metrics.overlap", "statistics.findings"]
    names += ["reporting.compare", "reporting.figures"]
    imports = "; ".join(f"import nnunetv2_mstkd.{name}" for name in names)
    code = f"{imports}; import sys; print('torch' in sys.modules, 'nnunetv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
