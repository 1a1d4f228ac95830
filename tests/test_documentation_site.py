"""The documentation site is built without warnings and without a network."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from argparse import SUPPRESS
from pathlib import Path

import pytest

from nnunetv2_mstkd import cli, methods

pytest.importorskip("material", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")

ROOT = Path(__file__).parents[1]
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    variables = {**os.environ, **NOWHERE, "NO_MKDOCS_2_WARNING": "1"}
    variables.pop("MSTKD_REPOSITORY_URL", None)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_command_and_option_is_described(site):
    page = html.unescape(re.sub("<[^>]+>", "", (site / "reference" / "commands.html").read_text(encoding="utf-8")))
    for name in cli.COMMANDS:
        command = cli._parser([name])._subparsers._group_actions[0].choices[name]
        assert f"mstkd {name}" in page
        shown = [action for action in command._actions[1:] if action.help != SUPPRESS]
        options = [option for action in shown for option in action.option_strings]
        assert [option for option in options if option not in page] == []


def test_every_method_has_its_card(site):
    cards = "".join(page.read_text(encoding="utf-8") for page in (site / "methods").glob("*.html"))
    for name in methods.__all__:
        if getattr(methods, name).__module__.startswith("nnunetv2_mstkd.methods."):
            assert name in cards, name


def test_links_between_repository_files_become_links_between_pages(site):
    card = (site / "methods" / "medmap.html").read_text(encoding="utf-8").partition("<article")[2]
    links = re.findall('href="([^":]*)"', card)
    assert {"../settings.html", "mstkd.html"} <= {link.partition("#")[0] for link in links}
    assert not [link for link in links if ".md" in link]


def test_no_list_or_table_is_left_as_text(site):
    """Markdown for the site needs four spaces where a code host takes two."""
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|script)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"^\s*(?:[*-] .*|\|.*)$", text, re.MULTILINE), page.name


def test_pages_ask_no_other_host(site):
    pages = [page.read_text(encoding="utf-8") for page in site.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="?(?:https?:)?//', page)
