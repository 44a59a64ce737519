"""The site: it builds without a warning, its links lead somewhere, it knows every public name, and it asks no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import speval

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="the site is built from a checkout")


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
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # What the theme has to say about its successor is no warning about these pages.
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


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


def test_the_page_of_functions_has_every_public_name(site, pages):
    ids = pages[site / "api.html"].ids
    for name in set(speval.__all__) - {"aio"}:
        assert f"speval.{name}" in ids
    for name in speval.aio.__all__:
        assert f"speval.aio.{name}" in ids
