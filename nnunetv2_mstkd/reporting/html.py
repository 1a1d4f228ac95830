"""Self-contained pages from the templates: style, script and pictures are inside."""

from __future__ import annotations

import base64
import functools
import hashlib
from datetime import datetime, timezone
from typing import Any

import jinja2

import nnunetv2_mstkd


def render(template: str, *, now: datetime | None = None, **content: Any) -> str:
    """A page of ``templates`` as HTML.

    All names are escaped, and the page's own policy forbids connections and all scripts but its own. ``now`` is the
    date of the page, default today.
    """
    date = (now or datetime.now(timezone.utc)).strftime("%Y-%m-%d")
    return _environment().get_template(template).render(date=date, **content)


@functools.cache  # a template is compiled once for the pages of all cases
def _environment() -> jinja2.Environment:
    """The templates, with what every page contains."""
    loader = jinja2.PackageLoader("nnunetv2_mstkd.reporting")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # our own, not escaped
    script, style = (loader.get_source(environment, f"report.{ending}")[0] for ending in ("js", "css"))
    environment.globals |= {
        "version": nnunetv2_mstkd.__version__,
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment
