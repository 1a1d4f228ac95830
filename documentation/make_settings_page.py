"""Write documentation/settings.md from the sections of all methods and the texts below their fields.

python documentation/make_settings_page.py
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path

from nnunetv2_mstkd.methods.registry import trainers
from nnunetv2_mstkd.training.settings import RENAMED, Section, known_sections

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings: the `"mstkd"` block of a plans configuration

One table per section. `mstkd configure --set section.key=value` writes a block into a new configuration; keys that are
not given keep the parent configuration's value, or the default. This page is made by
`documentation/make_settings_page.py`.
"""


def table(section: type[Section]) -> list[str]:
    """The rows of a section: key, default and the text below its field."""
    defaults = section().to_dict()
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and statement.target.id in defaults:
            key = statement.target.id
            text = " ".join(following.value.value.split()).replace("``", "`").replace("|", "\\|")
            rows.append(f"| `{key}` | `{json.dumps(defaults[key])}` | {text} |")
    return rows


def page() -> str:
    """The whole page as text."""
    own = [trainer for trainer in trainers().values() if trainer.__module__.startswith("nnunetv2_mstkd.")]
    lines = [HEAD]
    for name, section in known_sections().items():
        users = [trainer.__name__ for trainer in own if section in trainer.all_sections()]
        if not users:
            continue
        intro = (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ").replace(":class:", "")
        lines += [f"## `{name}`", "", intro.replace("``", "`"), ""]
        if not section.__module__.startswith("nnunetv2_mstkd.training."):
            lines += [f"Read by {', '.join(f'`{user}`' for user in users)}.", ""]
        lines += [*table(section), ""]
    lines += ["## Renamed keys", "", "Names of earlier versions are still read.", "", "| was | is |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
