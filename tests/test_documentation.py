"""The documentation says what the code does."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from nnunetv2_mstkd import cli, methods

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "documentation", ROOT / "nnunetv2_mstkd", ROOT / "benchmarks"]
PAGES = sorted({*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))})
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The ``mstkd`` commands in the code blocks of a page, without those that are abbreviated."""
    blocks = re.findall(r"^\s*```\w*\n(.*?)^\s*```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.split(r" (?:[|>]|&&|2>)", line.strip().removeprefix("$ "))[0] for line in lines]
    return [line for line in found if re.match("mstkd [a-z-]+( |$)", line) and "…" not in line and "..." not in line]


@pytest.mark.parametrize("script", ["make_settings_page.py", "make_metrics_page.py"])
def test_generated_pages_are_current(script):
    module = runpy.run_path(str(ROOT / "documentation" / script))
    assert module["page"]() == module["PAGE"].read_text(encoding="utf-8"), f"run python documentation/{script}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1100
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 100] == []


def test_trainers_page_lists_every_trainer():
    page = (ROOT / "documentation" / "trainers.md").read_text(encoding="utf-8")
    assert [name for name in methods.__all__ if f"`{name}`" not in page] == []


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.exists(), target
        assert not anchor or other.suffix != ".md" or anchor in anchors(other), target


@each_page
def test_commands_are_accepted(page):
    for command in commands(page):
        arguments = shlex.split(command, comments=True)[1:]
        try:
            cli._parser(arguments).parse_args(arguments)
        except SystemExit as stop:
            assert not stop.code, command
    assert set(re.findall(r"`mstkd ([a-z-]+)", page.read_text(encoding="utf-8"))) <= set(cli.COMMANDS)


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 20


def test_releases_and_their_pages_agree():
    from nnunetv2_mstkd.dataset_conversion.releases import RELEASES

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "documentation" / "datasets").glob("*.md")}
    for name, release in RELEASES.items():
        assert name in pages[release.family], f"{name} is not on the page {release.family}.md"
        assert (ROOT / "dataset_conversion" / f"{release.family}.py").is_file()
    named = {name for page in pages.values() for name in re.findall(r"mstkd convert (\w+)", page)}
    assert named <= {*RELEASES, "generic"}
