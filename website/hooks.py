"""What the site's build adds to MkDocs: generated parts of pages, and mathematics without JavaScript."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mkdocs.exceptions import PluginError

from generated import fill
from mathml import with_mathml


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace ``<!-- generated: NAME ARGUMENTS -->`` by what the code says."""
    try:
        return fill(markdown)
    except (LookupError, ValueError) as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Write formulas as MathML, which browsers draw by themselves."""
    try:
        return with_mathml(html)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
