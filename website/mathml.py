"""TeX formulas become MathML when the site is built: no script and no font is loaded to show them."""

from __future__ import annotations

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
_SUM = "\u2211"
_CLOSING = (")", "]", "\u2016")
# In a formula of its own, the limits of a sum stand below and above it.
_STACKED = {"msub": "munder", "msubsup": "munderover"}

ElementTree.register_namespace("", _NAMESPACE)


def with_mathml(page: str) -> str:
    """Return the page's HTML with every formula that arithmatex marked as ``<math>``.

    Raises ValueError for TeX that cannot be converted.
    """
    return _FORMULA.sub(_converted, page)


def _converted(match: re.Match[str]) -> str:
    tag, bracket, tex = match.groups()
    source = html.unescape(tex).strip()
    block = bracket == "["
    try:
        formula = convert(source, display="block" if block else "inline")
    except Exception as error:  # The converter has no common base of its errors.
        raise ValueError(f"formula {source!r} cannot be converted: {error!r}") from error
    if "\\" in formula:
        raise ValueError(f"formula {source!r}: a command was not understood.")
    return f'<{tag} class="math">{_set(formula, block)}</{tag}>'


def _set(formula: str, block: bool) -> str:
    """Return the formula with upright Greek capitals, as in TeX, and sums that need no special font."""
    root = ElementTree.fromstring(formula)
    for element in root.iter():
        kind = element.tag.removeprefix(f"{{{_NAMESPACE}}}")
        if kind == "mi" and element.text and "\u0391" <= element.text <= "\u03a9":
            element.set("mathvariant", "normal")
        if block and kind in _STACKED and len(element) and element[0].text == _SUM:
            element.tag = f"{{{_NAMESPACE}}}{_STACKED[kind]}"
        if kind in ("msup", "msubsup") and element[0].text in _CLOSING:
            element[0].tag, element[0].attrib = f"{{{_NAMESPACE}}}mi", {"mathvariant": "normal"}
        if block and kind == "mo" and element.text == _SUM:
            element.attrib |= {"class": "sum", "largeop": "false", "movablelimits": "false"}
    return ElementTree.tostring(root, encoding="unicode")
