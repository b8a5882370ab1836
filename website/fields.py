"""What docstrings say of each field or argument: the one place where they are documented."""

from __future__ import annotations

import re
import textwrap

# ``beta`` on a line of its own, or ``lr, momentum, weight_decay``, with indented text below.
_ITEM = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*)\n((?:[ \t]+\S.*(?:\n|$))+)", re.MULTILINE)
# ``cutoff``: text, up to the paragraph's end.
_INLINE = re.compile(r"``(\w+)``: (.+?)(?=\n\s*\n|\Z)", re.DOTALL)


def field_texts(docstring: str | None) -> dict[str, str]:
    """Return the sentences about each field that a docstring lists, as Markdown on one line."""
    text = _cleaned(docstring)
    found: dict[str, str] = {}
    for names, body in _ITEM.findall(text):
        for name in names.split(", "):
            found[name] = _one_line(body)
    for name, body in _INLINE.findall(text):
        found.setdefault(name, _one_line(body))
    return found


def as_sections(docstring: str, heading: str) -> str:
    """Return the docstring with its list of fields under a heading of NumPy's, which tools understand."""
    text = _cleaned(docstring)
    if not _ITEM.search(text) or re.search(r"^-{4,}$", text, re.MULTILINE):
        return text
    rest = _ITEM.sub("", text).strip()
    items = "".join(
        f"{names}\n{textwrap.indent(_one_line(body), '    ')}\n" for names, body in _ITEM.findall(text)
    )
    return f"{rest}\n\n{heading}\n{'-' * len(heading)}\n{items}"


def _cleaned(docstring: str | None) -> str:
    lines = (docstring or "").strip().split("\n", 1)
    return "\n".join([lines[0], textwrap.dedent(lines[1])] if len(lines) > 1 else lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
