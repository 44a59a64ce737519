"""The site: it builds without a warning, links lead somewhere, every public name is documented, and no other host is asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import speval

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "zensical.toml").is_file(), reason="the site is built from a checkout")


class Page(HTMLParser):
    """What one page of the site refers to, and the anchors it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()  # for a person to follow
        self.loads: set[str] = set()  # fetched by the browser by itself
        self.ids: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag == "link" and not {"canonical", "prev", "next"} & set(values.get("rel", "").split()):
            self.loads.add(values["href"])
        self.loads |= {values[name] for name in ("src", "srcset", "poster", "data") if values.get(name)}


pytestmark = pytest.mark.xdist_group("site")  # which takes seconds to build


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In a copy: the generator writes its cache and the site beside its configuration.
    folder = tmp_path_factory.mktemp("site")
    for name in ("zensical.toml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("docs", "examples", "speval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=folder, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


def names_in(nav: Any) -> list[str]:
    """Return the pages of a navigation in their order."""
    if isinstance(nav, str):
        return [nav]
    return [name for entry in (nav.values() if isinstance(nav, dict) else nav) for name in names_in(entry)]


def test_the_navigation_lists_every_page_once():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(names_in(nav)) == sorted(pages)


def test_every_link_of_the_site_leads_somewhere(site, pages):
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or file.name == "404.html":
                continue
            name, _, anchor = link.partition("#")
            # As a folder: the name of a page, its index.
            target = (file.parent / unquote(name)).resolve() if name else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file.relative_to(site)}: {link}"
            if anchor and anchor != "__top":
                assert unquote(anchor) in pages[target].ids, f"{file.relative_to(site)}: {link}"


def test_the_browser_fetches_nothing_from_another_host(site, pages):
    for file, page in pages.items():
        assert page.loads, file
        for address in page.loads:
            assert not re.match(r"([a-z]+:)?//", address) or address.startswith("data:"), f"{file.relative_to(site)}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_pictures_are_small_and_whole():
    for picture in (ROOT / "docs").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        assert len(text) < 300_000, picture
        assert not re.search(r"(href|src)=\"(?!#)|url\([\"']?https?:|@import", text), picture
    assert "prefers-reduced-motion" in (ROOT / "docs" / "recording.svg").read_text(encoding="utf-8")


def test_the_page_of_functions_has_every_public_name(site, pages):
    ids = pages[site / "api.html"].ids
    for name in set(speval.__all__) - {"aio"}:
        assert f"speval.{name}" in ids
    for name in speval.aio.__all__:
        assert f"speval.aio.{name}" in ids
