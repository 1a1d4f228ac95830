"""The documentation says what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "documentation").rglob("*.md")),
    *sorted((ROOT / "nnunetv2_mstkd").rglob("*.md")),
]


def test_settings_page_is_made_from_the_settings():
    file = ROOT / "documentation" / "make_settings_page.py"
    spec = importlib.util.spec_from_file_location("make_settings_page", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(encoding="utf-8"), "run python documentation/make_settings_page.py"


def _anchors(page: Path) -> set[str]:
    """What a code host makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_project_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)|src=\"([^\"]+)", text):
        link = "".join(target)
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        assert not anchor or anchor in _anchors(file), link


def test_commands_named_in_the_documentation_exist():
    from nnunetv2_mstkd.cli import COMMANDS

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`|&& )mstkd ([a-z][a-z-]+)", text, flags=re.MULTILINE))
    assert named and named <= set(COMMANDS)


def test_every_release_is_documented_and_every_documented_one_exists():
    from nnunetv2_mstkd.dataset_conversion.releases import RELEASES

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "documentation" / "datasets").glob("*.md")}
    for name, release in RELEASES.items():
        assert name in pages[release.page], f"{name} is not on the page {release.page}.md"
        assert (ROOT / "dataset_conversion" / f"{name}.py").is_file()
    named = {name for page in pages.values() for name in re.findall(r"mstkd convert (\w+)", page)}
    assert named <= {*RELEASES, "generic"}
