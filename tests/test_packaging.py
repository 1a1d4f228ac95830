"""The source archive and the wheel hold what they should, and their metadata suit a package index."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/owner/name"


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, repository: str = "") -> str:
    """Build both archives of a copy of the checkout into `folder`; return what setuptools printed."""
    copy = folder / "checkout"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "site", ".*", "mstkd_demo")
    shutil.copytree(ROOT, copy, ignore=skip)
    monkeypatch.setenv("MSTKD_REPOSITORY_URL", repository)
    code = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def metadata(folder: Path) -> email.message.Message:
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        return email.message_from_string(wheel.read(name).decode())


def links(text: str) -> list[str]:
    return re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text)


def test_archives_are_complete(tmp_path, monkeypatch):
    printed = build(tmp_path, monkeypatch)
    assert "absent from the `packages`" not in printed
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "documentation").rglob("*.md")}
    assert source >= {"CHANGELOG.md", "SECURITY.md", "nnunetv2_mstkd/methods/mstkd/README.md", *pages}
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        installed = set(wheel.namelist())
    data = [*ROOT.glob("nnunetv2_mstkd/reporting/templates/*"), *ROOT.glob("nnunetv2_mstkd/app/static/*")]
    data += ROOT.glob("dataset_conversion/protocols/*.csv")
    short = {"/".join(name.split("/")[-2:]) for name in installed}
    assert short >= {f"{path.parent.name}/{path.name}" for path in data}
    assert not any(name.endswith(".md") or name.startswith(("tests/", "documentation/")) for name in installed)

    assert metadata(tmp_path).get_all("Project-URL") is None  # no address is invented
    assert metadata(tmp_path).get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    twine = pytest.importorskip("twine.commands.check")
    assert not twine.check([str(path) for path in tmp_path.glob("*.*")], strict=True)


def test_released_readme_has_absolute_links(tmp_path, monkeypatch):
    build(tmp_path, monkeypatch, ADDRESS + "/")
    found = metadata(tmp_path)
    assert f"Source, {ADDRESS}" in found.get_all("Project-URL")
    targets = links(found.get_payload())
    assert len(targets) == len(links((ROOT / "README.md").read_text(encoding="utf-8")))
    assert all(re.match("https://|#", target) for target in targets), targets
    ours = [target for target in targets if target.startswith(ADDRESS)]
    places = [re.fullmatch(rf"{ADDRESS}/(blob|raw)/v{found['Version']}/([^#]+)(#.*)?", target) for target in ours]
    assert {place[1] for place in places} == {"blob", "raw"}
    assert all((ROOT / place[2]).exists() for place in places)


def test_workflows_run_what_contributors_run():
    runs = {}
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text())["jobs"].values()
        runs[file.stem] = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs["tests"] and ".ci/run" in runs["release"]
    assert "mkdocs build --strict" in runs["docs"]
