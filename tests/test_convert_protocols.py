"""Published protocols: what the shipped lists hold, and data sets that follow them."""

from __future__ import annotations

import csv
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import release_trees
from conftest import empty_folders

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion import protocols
from nnunetv2_mstkd.dataset_conversion.conversion import convert
from nnunetv2_mstkd.dataset_conversion.job import Options
from nnunetv2_mstkd.dataset_conversion.protocols import PROTOCOLS, Protocol, protocol_list
from nnunetv2_mstkd.dataset_conversion.releases import RELEASES
from nnunetv2_mstkd.dataset_conversion.splits import read_lists
from nnunetv2_mstkd.errors import InputError

SIZES = {
    "rfnet2018-1": (199, 29, 57),
    "rfnet2018-2": (199, 29, 57),
    "rfnet2018-3": (199, 29, 57),
    "rfnet2020": (219, 50, 100),
    "imfuse2023": (875, 125, 251),
}


def parts_of(name: str) -> tuple[list[str], list[str], list[str]]:
    release = PROTOCOLS[name].release
    (fold,), test = read_lists([protocol_list(name, release)], RELEASES[release].case_names)
    return fold["train"], fold["val"], test


@pytest.mark.parametrize("name", PROTOCOLS)
def test_sizes_and_names(name):
    parts = parts_of(name)
    assert tuple(map(len, parts)) == SIZES[name]
    release = RELEASES[PROTOCOLS[name].release]
    cases = [case for part in parts for case in part]
    assert len(set(cases)) == len(cases) == sum(SIZES[name])
    assert all(re.fullmatch(release.case_names, case, re.ASCII) for case in cases)
    patients = [{release.description().patient_of(case) for case in part} for part in parts]
    assert all(one.isdisjoint(other) for one, other in combinations(patients, 2))


def test_every_table_is_a_protocol_with_its_source():
    files = sorted((Path(protocols.__file__).parent / "protocols").iterdir())
    assert [file.stem for file in files] == sorted(PROTOCOLS)
    for file in files:
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert len(re.findall(r"https://github\.com/\S+", "\n".join(head))) == 2  # two that agree
        assert len(re.findall(r"commit\s+#?\s*[0-9a-f]{40}\b", "\n".join(head))) >= 2


def test_rfnet2020_divides_the_whole_release():
    assert {case[-3:] for part in parts_of("rfnet2020") for case in part} == {f"{n:03d}" for n in range(1, 370)}


def test_splits_of_2018_divide_the_same_cases_and_overlap_as_noted():
    splits = {name: parts_of(name) for name in PROTOCOLS if name.startswith("rfnet2018")}
    assert len({frozenset(case for part in parts for case in part) for parts in splits.values()}) == 1
    shared = [len(set(one[2]) & set(other[2])) for one, other in combinations(splits.values(), 2)]
    note = PROTOCOLS["rfnet2018-1"].note
    assert shared == [int(number) for number in re.findall(r"(\d+)(?: cases)? in \d and \d", note)]


# ---- data sets -----------------------------------------------------------------------------------------------------


A, B, C, D = release_trees.case_names("brats2020")
TOY = {"train": [A, B], "val": [C], "test": [D]}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    release_trees.use_small_grids(monkeypatch)
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small BraTS 2020 whose four cases are those of ``rfnet2020``."""
    table = tmp_path / "lists" / "protocols" / "rfnet2020.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", newline="") as file:
        rows = [(case, part) for part, cases in TOY.items() for case in cases]
        csv.writer(file).writerows([("case", "part"), *rows])
    monkeypatch.setattr(protocols, "__file__", str(table.parents[1] / "protocols.py"))
    release_trees.make_release(tmp_path / "source", "brats2020")
    return tmp_path / "source"


def run(source: Path, *options: str) -> int:
    arguments = ["convert", "brats2020", str(source), "-d", "7", "--name", "Toy", "--workers", "1", *options]
    return cli.main([*arguments, "--protocol", "rfnet2020"])


def written(folders: Path, part: str) -> list[str]:
    return sorted(path.name for path in (folders / "raw" / "Dataset007_Toy" / part).glob("*"))


def label_of(source: Path, case: str) -> Path:
    return release_trees.case_folder(source, "brats2020", case) / release_trees.file_of("brats2020", case)


def test_protocol_sets_fold_and_test_cases(folders, source, capsys):
    assert run(source) == 0
    file = folders / "preprocessed" / "Dataset007_Toy" / "splits_final.json"
    assert json.loads(file.read_text()) == [{"train": [A, B], "val": [C]}]
    assert written(folders, "labelsTr") == [f"{case}.nii.gz" for case in (A, B, C)]
    assert written(folders, "labelsTs") == [f"{D}.nii.gz"]
    assert len(written(folders, "imagesTs")) == 4
    out = capsys.readouterr().out
    assert "rfnet2020: 2 cases to train on, 1 to validate on, 1 to test on" in out
    record = json.loads((folders / "raw" / "Dataset007_Toy" / "conversion.json").read_text())
    assert record["settings"]["protocol"] == "rfnet2020"
    assert run(source) == 0  # verifies
    assert "already complete" in capsys.readouterr().out


def test_note_of_a_protocol_is_printed(source, capsys, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "rfnet2020", Protocol("brats2020", "its test sets overlap"))
    assert run(source) == 0
    assert "note: its test sets overlap" in capsys.readouterr().out


def test_cases_outside_the_protocol_are_left_out(folders, source, capsys):
    stranger = release_trees.case_folder(source, "brats2020", "BraTS20_Validation_001")
    release_trees.case_folder(source, "brats2020", A).rename(stranger)  # no file has its name, which would be a problem
    table = Path(protocols.__file__).parent / "protocols" / "rfnet2020.csv"
    table.write_text("".join(line for line in table.open() if not line.startswith(A)))
    assert run(source) == 0
    assert "1 case that rfnet2020 does not name left out, such as BraTS20_Validation_001" in capsys.readouterr().out
    assert written(folders, "labelsTr") + written(folders, "labelsTs") == [f"{case}.nii.gz" for case in (B, C, D)]


@pytest.mark.parametrize("case", [A, C, D])
def test_incomplete_download_is_refused(folders, source, capsys, case):
    release_trees.case_folder(source, "brats2020", case).rename(source.parent / "elsewhere")
    assert run(source) == 2
    assert f"the lists of rfnet2020 name 1 of 4 cases that do not exist: {case}" in capsys.readouterr().err
    assert written(folders, "") == []


@pytest.mark.parametrize("case", [B, C, D])
def test_case_without_a_label_is_refused(folders, source, capsys, case):
    path = label_of(source, case)
    (path if path.exists() else next(path.parent.glob("W39*"))).unlink()
    assert run(source) == 2
    assert f"1 problem, nothing was written:\n  {case}: label: no file matches" in capsys.readouterr().err
    assert written(folders, "") == []


def test_damaged_case_is_refused(folders, source, capsys):
    path = label_of(source, B)
    path.write_bytes(path.read_bytes()[:-100])
    assert run(source) == 2
    assert f"1 problem, nothing was written:\n  {B}: " in capsys.readouterr().err
    assert written(folders, "") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "2"], "found several of --folds, --val-cases, --splits, --protocol and --no-splits"),
        (["--no-splits"], "found several of"),
        (["--allow-missing"], "found --protocol and --allow-missing"),
        (["--unlabelled"], "found --protocol and --unlabelled,"),
        (["--unlabelled-as-test"], "found --protocol and --unlabelled-as-test"),
        (["--test-fraction", "0.2"], "found --protocol and --test-fraction"),
        (["--test-cases", A], "found --protocol and --test-cases"),
    ],
)
def test_options_that_would_change_a_protocol_are_refused(source, capsys, options, message):
    assert run(source, *options) == 2
    assert message in capsys.readouterr().err


def test_protocol_of_another_release_is_refused(source):
    with pytest.raises(InputError, match="'imfuse2023', expected one of those of brats2020: rfnet2020"):
        convert(source, RELEASES["brats2020"].description(), "Dataset007_Toy", Options(protocol="imfuse2023"))
    with pytest.raises(InputError, match="of brats2021: none"):
        protocol_list("m2ftrans2021", "brats2021")


@pytest.mark.parametrize(("release", "shown"), [("brats2018", True), ("brats2023_gli", True), ("brats2021", False)])
def test_help_offers_the_protocols_of_the_release(capsys, release, shown):
    with pytest.raises(SystemExit):
        cli.main(["convert", release, "--help"])
    out = capsys.readouterr().out
    assert ("--protocol" in out) == shown
    assert all((name in out) == (protocol.release == release) for name, protocol in PROTOCOLS.items())


def test_published_lists_of_brats2020_are_read_as_they_are(folders, source, tmp_path):
    lists = [tmp_path / f"{part}.txt" for part in TOY]
    for path, cases in zip(lists, TOY.values(), strict=True):
        path.write_text("".join(f"HG_{case}\n" for case in cases))
    arguments = ["convert", "brats2020", str(source), "-d", "7", "--name", "Toy", "--workers", "1"]
    assert cli.main([*arguments, "--splits", *map(str, lists)]) == 0
    file = folders / "preprocessed" / "Dataset007_Toy" / "splits_final.json"
    assert json.loads(file.read_text()) == [{"train": [A, B], "val": [C]}]
