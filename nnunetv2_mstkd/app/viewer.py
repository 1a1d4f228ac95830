"""NiiVue, the viewer of the page, from the package ipyniivue, which ships it built.

The bundle of that package, a widget for notebooks, has the whole of NiiVue in one module without imports, but exports
the widget only. So it is served with one more export; nothing of it is kept in this package.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from nnunetv2_mstkd.errors import DependencyError

PACKAGE = "ipyniivue"


def niivue_module() -> str:
    """Return a JavaScript module that exports the class ``Niivue``; DependencyError if it cannot be found."""
    found = importlib.util.find_spec(PACKAGE)  # importing it would import all of Jupyter's widgets
    folders = list(found.submodule_search_locations or ()) if found else []
    bundle = next((file for folder in folders if (file := Path(folder, "static", "widget.js")).is_file()), None)
    if bundle is None:
        raise DependencyError(f"the page needs {PACKAGE}, which brings the viewer: {INSTALL}")
    text = bundle.read_text(encoding="utf-8")
    made = re.search(r'"Creating new Niivue instance"\);.{0,120}?=new (\w+)\(', text, re.DOTALL)
    if made is None:
        raise DependencyError(f"the installed version of {PACKAGE} holds no NiiVue where it is expected: {INSTALL}")
    return f"{text}\nexport {{ {made[1]} as Niivue }};\n"


INSTALL = "pip install 'nnunetv2_mstkd[app]'"
