"""The notebook documentation/tutorial.ipynb runs from data to report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from conftest import command

NOTEBOOK = Path(__file__).parents[1] / "documentation" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_tutorial_runs(tmp_path, monkeypatch):
    code = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    for long, short in (
        (r"^EPOCHS = \d+", "EPOCHS = 1"),
        (r"--iterations \d+", "--iterations 2"),
        (r" cases=\d+", " cases=5"),
    ):
        code, replaced = re.subn(long, short, code, flags=re.MULTILINE)
        assert replaced == 1
    start = subprocess.run

    def run(words, **options):
        """Run what is a command in this process."""
        if words[0] != Path(sys.executable).with_name(Path(words[0]).name):
            return start(words, **options)
        with redirect_stdout(options["stdout"]), redirect_stderr(options["stderr"]):
            return command(Path(words[0]).name, *words[1:])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):
        exec(compile(code, str(NOTEBOOK), "exec"), {"__name__": "__main__"})
    models = list((tmp_path / "tutorial" / "nnUNet_results" / "Dataset902_Tutorial").iterdir())
    assert len(models) == 2
    assert all((model / "subsets" / "report.html").is_file() for model in models)
    assert (tmp_path / "tutorial" / "phantom_test_000.nii.gz").is_file()
    assert (tmp_path / "tutorial" / "comparison" / "comparison.md").is_file()


def test_tutorial_was_executed_without_errors():
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    home = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/")
    assert not [output for output in outputs if home.search(json.dumps(output.get("text", output.get("data", ""))))]


def test_links_of_the_tutorial_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    assert [target for target in targets if not (NOTEBOOK.parent / target).exists()] == []
