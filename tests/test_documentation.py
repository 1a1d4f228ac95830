"""The documentation says what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "documentation").rglob("*.md"))]


def test_settings_page_is_made_from_the_settings():
    file = ROOT / "documentation" / "make_settings_page.py"
    spec = importlib.util.spec_from_file_location("make_settings_page", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(encoding="utf-8"), "run python documentation/make_settings_page.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_commands_named_in_the_readme_exist():
    from nnunetv2_mstkd.cli import COMMANDS

    named = set(re.findall(r"\bmstkd ([a-z][a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named and named <= set(COMMANDS)


def test_every_release_is_documented_and_every_documented_one_exists():
    from nnunetv2_mstkd.dataset_conversion.releases import RELEASES

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "documentation" / "datasets").glob("*.md")}
    for name, release in RELEASES.items():
        assert name in pages[release.family], f"{name} is not on the page {release.family}.md"
        assert (ROOT / "dataset_conversion" / f"{release.family}.py").is_file()
    named = {name for page in pages.values() for name in re.findall(r"mstkd convert (\w+)", page)}
    assert named <= {*RELEASES, "generic"}
