"""A griffe extension: field lists in docstrings become sections of the Python reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from fields import as_sections


class FieldLists(griffe.Extension):
    """Rewrites the docstrings that list fields, after a package was read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            heading = "Parameters" if obj.is_function else "Attributes"
            obj.docstring.value = as_sections(obj.docstring.value, heading)
