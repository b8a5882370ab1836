"""The site builds without a warning, every page can be reached, and viewing it asks no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from pages import DOCS, PAGES, REPOSITORY

from generated import PARTS

LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "link": "href",
    "source": "src",
    "video": "src",
    "object": "data",
    "use": "href",
}
HARMLESS_LINKS = {"canonical", "prev", "next", "alternate"}
CSS_ADDRESS = re.compile(r"(?:url\(|@import\s)\s*[\"']?(https?:|//)")


class Reader(HTMLParser):
    """Collects what a page loads, where it links to and which anchors it has."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        passive = tag == "link" and found.get("rel", "") in HARMLESS_LINKS
        if tag in LOADING and LOADING[tag] in found and not passive:
            self.loads.append(found[LOADING[tag]])
        self.loads += [part.split()[0] for part in found.get("srcset", "").split(",") if part.strip()]


@cache
def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    place = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    return place


def test_every_page_is_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(_leaves(yaml.safe_load(text)["nav"]))
    there = {str(page.relative_to(DOCS)) for page in PAGES}
    assert there - named == set(), "add these to nav in mkdocs.yml"
    assert named - there == set(), "nav in mkdocs.yml names pages that do not exist"


def _leaves(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [leaf for child in children for leaf in _leaves(child)]  # type: ignore[attr-defined]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    outside = [
        f"{page.relative_to(site)}: {address}"
        for page in site.rglob("*.html")
        for address in read(page).loads
        if urlsplit(address).netloc or address.startswith("//")
    ]
    styles = [path for path in site.rglob("*.css") if CSS_ADDRESS.search(path.read_text(encoding="utf-8"))]
    assert outside == []
    assert styles == []


def test_pages_ask_for_no_script_on_demand(site: Path) -> None:
    """The theme fetches a library for diagrams when it meets one, and repository facts when it knows one."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text, page
        assert 'data-md-component="source"' not in text, page


def test_every_link_and_anchor_resolves(site: Path) -> None:
    broken, count = [], 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for link in read(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = (
                not anchor or target.suffix != ".html" or (target.is_file() and anchor in read(target).ids)
            )
            if not target.is_file() or not known:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert count > 1000
    assert broken == []


def test_all_marks_were_filled_and_formulas_set(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- generated:" not in text, page
        assert "--8&lt;--" not in text, page
        assert 'class="arithmatex"' not in text, page
    assert (site / "strategies" / "fedau.html").read_text(encoding="utf-8").count("<math") > 10


def test_every_part_is_used() -> None:
    used = {
        mark
        for page in PAGES
        for mark in re.findall(r"<!-- generated: ([\w-]+)", page.read_text(encoding="utf-8"))
    }
    assert used == set(PARTS)


@pytest.mark.parametrize(
    ("page", "texts"),
    [
        ("reference/experiment-file.html", ["evaluate_every", "shards_per_client", "sigma_down", "p_high"]),
        ("reference/command-line.html", ["--enrol-address", "TURNOUT_SERVER_ADDRESS", "turnout runs export"]),
        ("reference/api/strategies.html", ["ParticipationEstimator", "max_update_norm"]),
        ("reference/api/tasks.html", ["label_distribution", "num_clients"]),
        ("strategies/fedstale.html", ["empty_round", "2405.04171", "holds"]),
        ("contributing.html", ["make chaos"]),
    ],
)
def test_pages_hold_what_they_are_for(site: Path, page: str, texts: list[str]) -> None:
    content = (site / page).read_text(encoding="utf-8")
    assert [text for text in texts if text not in content] == []


def test_the_reference_has_every_exported_name(site: Path) -> None:
    import importlib

    missing = []
    for page in sorted((DOCS / "reference" / "api").glob("*.md")):
        [package, *_] = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        ids = read(site / "reference" / "api" / f"{page.stem}.html").ids
        module = importlib.import_module(package)
        missing += [f"{package}.{name}" for name in module.__all__ if f"{package}.{name}" not in ids]
    assert missing == []
