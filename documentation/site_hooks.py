"""Hooks of the documentation site (mkdocs.yml): pages that lie elsewhere in the repository, and generated ones.

The method cards, CONTRIBUTING.md and others stay where a code host shows them; their links are moved with them.
"""

from __future__ import annotations

import json
import posixpath
import re
import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
ROOT = HERE.parent

API = """# All classes and functions

How they fit together: [Python API](../python_api.md).

## Prediction, evaluation, comparison

::: nnunetv2_mstkd.inference.predictor
    options:
      show_root_heading: false
      members: [Predictor, Prediction, FolderResult]

::: nnunetv2_mstkd.reporting.evaluate.evaluate

::: nnunetv2_mstkd.reporting.compare.compare

## Errors

::: nnunetv2_mstkd.errors
    options:
      show_root_heading: false
      filters: [Error$]

## For methods in other packages

::: nnunetv2_mstkd.modalities
    options:
      show_root_heading: false

::: nnunetv2_mstkd.training.base.SettingsTrainer

::: nnunetv2_mstkd.training.modality_dropout.ModalityDropoutTrainer

::: nnunetv2_mstkd.training.distillation.DistillationTrainer

::: nnunetv2_mstkd.training.step
    options:
      show_root_heading: false

::: nnunetv2_mstkd.testing
    options:
      show_root_heading: false
"""

LINK = re.compile(r"""(\[(?:[^\[\]]|!\[[^]]*\]\([^)]*\))*\]\(|src=")([^)"\s#]+)(#[^)"\s]*)?([)"])""")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(~?)([^<]*)</code>")


def outside_pages() -> dict[str, str]:
    """Page of the site -> file of the repository, for those outside documentation/."""
    pages = {f"{name.lower()}.md": f"{name}.md" for name in ("SECURITY", "CONTRIBUTING", "CHANGELOG")}
    for card in sorted(ROOT.glob("nnunetv2_mstkd/methods/*/README.md")):
        pages[f"methods/{card.parent.name}.md"] = card.relative_to(ROOT).as_posix()
    for result in sorted([*ROOT.glob("benchmarks/results/*.md"), *ROOT.glob("benchmarks/results/*.png")]):
        pages[result.relative_to(ROOT).as_posix()] = result.relative_to(ROOT).as_posix()
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the card of every method in the navigation, which has an empty entry for them."""
    cards = [page for page in outside_pages() if page.startswith("methods/")]
    (methods,) = [
        entry
        for group in config.nav
        if isinstance(group, dict)
        for entry in group.get("Explanation", ())
        if isinstance(entry, dict) and "Methods" in entry
    ]
    methods["Methods"] = cards
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere and the generated ones."""
    for page, source in outside_pages().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    commands = runpy.run_path(str(HERE / "make_commands_page.py"))["page"]()
    files.append(File.generated(config, "reference/commands.md", content=commands))
    files.append(File.generated(config, "reference/api.md", content=API))
    files.append(File.generated(config, "tutorial.md", content=notebook(HERE / "tutorial.ipynb")))
    return files


def notebook(file: Path) -> str:
    """A notebook with its outputs as a page."""
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            found = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in found:
                parts.append(f'<img src="data:image/png;base64,{"".join(found["image/png"]).strip()}" alt="output">')
            elif "text/html" in found:
                parts.append("".join(found["text/html"]))
            else:
                parts.append(f"```text\n{''.join(found['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between repository files to their pages; files without a page are at the repository's address."""
    outside = outside_pages()
    address = page.file.src_uri
    if address.startswith("reference/"):
        return markdown
    source = outside.get(address, f"documentation/{address}")
    pages = {file: page for page, file in outside.items()}

    def moved(match: re.Match) -> str:
        start, target, anchor, end = match.groups(default="")
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        its_page = pages.get(file) or (file.removeprefix("documentation/") if file.startswith("documentation/") else "")
        if its_page:
            return start + posixpath.relpath(its_page, posixpath.dirname(address) or ".") + anchor + end
        if config.repo_url and (ROOT / file).exists():
            return f"{start}{config.repo_url.rstrip('/')}/blob/HEAD/{file}{anchor}{end}"
        return f"{start[1:-2]} (`{file}`)" if (ROOT / file).exists() else match[0]

    parts = CODE.split(markdown)  # every second part is code
    return restored(LINK.sub(moved, "".join(hidden(part, number) for number, part in enumerate(parts))), parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the roles of the docstrings (``:func:`~package.name```) as plain code."""
    return ROLE.sub(lambda match: f"<code>{match[2].rpartition('.')[2] if match[1] else match[2]}</code>", html)


def hidden(part: str, number: int) -> str:
    """A part of a page; code is replaced by a mark, so that a link may go across it and none is seen in it."""
    return f"\0{number}\0" if number % 2 else part


def restored(text: str, parts: list[str]) -> str:
    """The page with its code in place of the marks."""
    return re.sub("\0(\\d+)\0", lambda match: parts[int(match[1])], text)
