from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2_mstkd.inference.expected_dice import SUMMARY, read_expected_dice

NAMES = ("T1", "T1ce", "FLAIR")


def summary(folder: Path, content: object) -> Path:
    (folder / SUMMARY).parent.mkdir()
    (folder / SUMMARY).write_text(json.dumps(content))
    return folder


def test_without_an_evaluation_nothing_is_expected(tmp_path):
    assert read_expected_dice(tmp_path, NAMES) == {}


def test_subsets_are_found_whatever_their_order_and_case(tmp_path):
    regions = {"WT": {"dice": 0.5, "hd95": 3.0}, "ET": {"dice": 1}}
    folder = summary(tmp_path, {"model": "x", "subsets": {"flair+T1ce": regions, "all": {"WT": {"dice": 0.75}}}})
    # bit 1 is T1ce, bit 2 is FLAIR
    assert read_expected_dice(folder, NAMES) == {0b110: {"WT": 0.5, "ET": 1.0}, 0b111: {"WT": 0.75}}


def test_a_region_without_a_number_is_left_out(tmp_path):
    regions = {"WT": {"dice": None}, "TC": {"dice": float("nan")}, "ET": {}, "NCR": {"dice": 0.25}}
    assert read_expected_dice(summary(tmp_path, {"subsets": {"T1": regions}}), NAMES) == {1: {"NCR": 0.25}}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"subsets": []},
        {"subsets": {"T2": {}}},
        {"subsets": {"T1": 0.5}},
        {"subsets": {"T1": {"WT": 0.5}}},
        {"subsets": {"T1": {"WT": {"dice": "high"}}}},
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content):
    with pytest.raises(ValueError, match=r"summary\.json is not an evaluation of this model's subsets"):
        read_expected_dice(summary(tmp_path, content), NAMES)
