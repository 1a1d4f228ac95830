"""The block of commands of documentation/papers_table.md: from conversion to the table of the papers."""

from __future__ import annotations

import csv
import os
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import release_trees
from conftest import Folders, plan_and_preprocess, train

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion import protocols

PAGE = Path(__file__).parents[1] / "documentation" / "papers_table.md"
BLOCK = re.search(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
CASES = {
    part: [f"BraTS20_Training_{number:03d}" for number in numbers]
    for part, numbers in {"train": range(1, 5), "val": range(5, 7), "test": range(7, 10)}.items()
}
MODELS = ("dropout", "RFNet", "mmFormer", "MST-KDNet")


def run(words: list[str], folders: Folders, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of the block, in this process and on the CPU."""
    program, *rest = [str(source) if word == "SOURCE" else os.path.expandvars(word) for word in words]
    if program == "export":
        monkeypatch.setenv(*rest[0].split("="))
    elif program == "nnUNetv2_plan_and_preprocess":
        assert rest == ["-d", "120", "-c", "3d_fullres"]
        plan_and_preprocess(folders, 120, "3d_fullres")
    elif program == "nnUNetv2_train":
        dataset, configuration, fold, option, trainer = rest
        assert option == "-tr"
        train(trainer, dataset=int(dataset), fold=int(fold), configuration=configuration)
    else:
        assert program == "mstkd"
        quick = ["-device", "cpu", "--disable_tta", "-npp", "0", "-nps", "0"] if rest[0] == "evaluate" else []
        assert cli.main([*rest, *quick]) == 0, words


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small BraTS 2020 whose cases are those of ``rfnet2020``."""
    release_trees.use_small_grids(monkeypatch)
    table = tmp_path / "lists" / "protocols" / "rfnet2020.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", newline="") as file:
        rows = [(case, part) for part, cases in CASES.items() for case in cases]
        csv.writer(file).writerows([("case", "part"), *rows])
    monkeypatch.setattr(protocols, "__file__", str(table.parents[1] / "protocols.py"))
    release_trees.make_release(tmp_path / "source", "brats2020", [case for cases in CASES.values() for case in cases])
    return tmp_path / "source"


def test_commands_make_the_table_the_figures_and_the_page(tmp_path, monkeypatch, source, capsys):
    folders = Folders(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results", "Dataset120_BraTS2020")
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
    folders.use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for line in filter(None, BLOCK.replace("\\\n", "").splitlines()):
        run(shlex.split(line), folders, source, monkeypatch)
    out = tmp_path / "test" / "comparison"
    table = pd.read_csv(out / "tables.csv")
    assert set(table["model"]) == set(MODELS) and table.columns[3:-1].size == 15
    assert set(table["region"]) >= {"whole tumor", "tumor core", "enhancing tumor"}
    assert any("min 500" in region for region in table["region"])
    assert "**" in (out / "tables.md").read_text(encoding="utf-8")
    assert r"\textbf" in (out / "tables.tex").read_text(encoding="utf-8")
    assert all(name in (out / "comparison.html").read_text(encoding="utf-8") for name in MODELS)
    for picture in ("qualitative.png", "cost.png", "comparison.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    scored = pd.read_csv(tmp_path / "test" / "rfnet" / "results.csv")
    assert set(scored["case"]) == set(CASES["test"])
