"""Write documentation/settings.md from the dataclasses in nnunetv2_mstkd/settings.py and the texts below their fields.

python documentation/make_settings_page.py
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

from nnunetv2_mstkd.training import settings

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings: the `"mstkd"` block of a plans configuration

One table per section. `mstkd configure --set section.key=value` writes a complete block into a new configuration; keys
that are not given keep the parent configuration's value, or the default. This page is made by
`documentation/make_settings_page.py`.
"""


def page() -> str:
    """The whole page as text."""
    classes = {
        node.name: node for node in ast.parse(inspect.getsource(settings)).body if isinstance(node, ast.ClassDef)
    }
    defaults = settings.Settings().to_block()
    lines = [HEAD]
    for section, dataclass in settings.SECTIONS.items():
        intro = (inspect.getdoc(dataclass) or "").split("\n\n")[0].replace("\n", " ").replace(":class:", "")
        lines += [f"## `{section}`", "", intro.replace("``", "`"), "", "| key | default | meaning |", "|---|---|---|"]
        body = classes[dataclass.__name__].body
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and statement.target.id in defaults[section]:
                key = statement.target.id
                text = " ".join(following.value.value.split()).replace("``", "`").replace("|", "\\|")
                lines.append(f"| `{key}` | `{json.dumps(defaults[section][key])}` | {text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
