"""TeX formulas become MathML when the site is built: no script and no font is loaded to show them."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def with_mathml(page: str) -> str:
    """Return the page's HTML with every formula that arithmatex marked as ``<math>``.

    Raises ValueError for TeX that cannot be converted.
    """
    return _FORMULA.sub(_converted, page)


def _converted(match: re.Match[str]) -> str:
    tag, bracket, tex = match.groups()
    source = html.unescape(tex).strip()
    try:
        formula = convert(source, display="block" if bracket == "[" else "inline")
    except Exception as error:  # The converter has no common base of its errors.
        raise ValueError(f"formula {source!r} cannot be converted: {error!r}") from error
    if "\\" in formula:
        raise ValueError(f"formula {source!r}: a command was not understood.")
    return f'<{tag} class="math">{formula}</{tag}>'
