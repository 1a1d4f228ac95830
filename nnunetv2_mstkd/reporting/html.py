"""Self-contained pages from the templates: style, script and pictures are inside."""

from __future__ import annotations

import base64
import functools
import hashlib
from datetime import datetime, timezone
from typing import Any, NamedTuple

import jinja2

import nnunetv2_mstkd


def render(template: str, *, now: datetime | None = None, **content: Any) -> str:
    """A page of ``templates`` as HTML.

    All names are escaped, and the page's own policy forbids connections and all scripts but its own. ``now`` is the
    date of the page, default today.
    """
    templates = _templates()
    return templates.environment.get_template(template).render(
        date=(now or datetime.now(timezone.utc)).strftime("%Y-%m-%d"),
        version=nnunetv2_mstkd.__version__,
        style=templates.style,
        script=templates.script,
        script_hash=base64.b64encode(hashlib.sha256(templates.script.encode()).digest()).decode(),
        **content,
    )


class _Templates(NamedTuple):
    environment: jinja2.Environment
    script: str
    style: str


@functools.cache  # a template is compiled once for the pages of all cases
def _templates() -> _Templates:
    loader = jinja2.PackageLoader("nnunetv2_mstkd.reporting")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # our own, not escaped
    script, style = (loader.get_source(environment, f"report.{ending}")[0] for ending in ("js", "css"))
    return _Templates(environment, script, style)
