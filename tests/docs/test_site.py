"""The site builds strictly, has every public name, and opens in a browser: two widths, light and dark."""

from __future__ import annotations

import functools
import http.server
import inspect
import itertools
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from support.browser import chromium
from support.paths import ROOT

import feedbackhook

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

API = (ROOT / "docs/api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Any warning of the build, such as a link that leads nowhere, fails here."""
    folder = tmp_path_factory.mktemp("site")
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert warned == []
    return folder


def test_every_public_name_has_an_entry_and_no_other(site: Path) -> None:
    entries = {
        entry.removeprefix("feedbackhook.") for entry in re.findall(r"^::: (\S+)$", API, flags=re.MULTILINE)
    }
    assert {entry for entry in entries if "." not in entry} == set(feedbackhook.__all__)
    page = (site / "api/index.html").read_text(encoding="utf-8")
    for name in sorted(entries):
        assert f'id="feedbackhook.{name}"' in page, f"{name} is not shown"


def test_public_methods_are_shown(site: Path) -> None:
    page = (site / "api/index.html").read_text(encoding="utf-8")
    methods = [name for name, _ in inspect.getmembers(feedbackhook.Patch) if not name.startswith("_")]
    assert len(methods) > 10
    assert [name for name in methods if f'id="feedbackhook.Patch.{name}"' not in page] == []


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Fonts, scripts and pictures are the site's own; links to other sites may lead away."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert loaded == [], page.relative_to(site)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as browser:
        yield browser


LOOK = """
const page = document.documentElement;
return [page.scrollWidth - page.clientWidth,
        [...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src),
        getComputedStyle(document.body).backgroundColor]
"""
BACKGROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(30, 33, 41)"}


def emulate(browser: Chrome, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def look(browser: Chrome, scheme: str) -> list[object]:
    """What a page looks like once it has settled in this scheme, or after 20 seconds."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    good = [0, [], BACKGROUND[scheme]]
    try:
        WebDriverWait(browser, 20, 0.05).until(lambda b: b.execute_script(LOOK)[:3] == good)
    except TimeoutException:
        return browser.execute_script(LOOK)
    return good


def faults(browser: Chrome, address: str, page: str) -> dict[object, object]:
    """What is wrong with a page: too wide, without a picture, in the wrong colors, or complaints."""
    found: dict[object, object] = {}
    emulate(browser, 1280, "light")
    browser.get(f"{address}/{page}/")
    for width, scheme in itertools.product((1280, 390), BACKGROUND):
        emulate(browser, width, scheme)
        if (seen := look(browser, scheme)) != [0, [], BACKGROUND[scheme]]:
            found[page, width, scheme] = seen
    if said := [entry["message"] for entry in browser.get_log("browser")]:
        found[page] = said
    return found


@pytest.mark.parametrize("page", [".", "start", "rules", "experiments/reports"])
def test_a_page_opens_wide_and_narrow_light_and_dark(browser: Chrome, address: str, page: str) -> None:
    assert faults(browser, address, page) == {}


@pytest.mark.slow
def test_every_page_does(browser: Chrome, site: Path, address: str) -> None:
    pages = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    assert len(pages) > 40
    assert {page: found for page in pages if (found := faults(browser, address, page))} == {}


def test_the_search_finds_a_rule(browser: Chrome, address: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    emulate(browser, 1280, "light")
    browser.get(f"{address}/?q=toeplitz")
    found = WebDriverWait(browser, 60).until(
        lambda b: b.execute_script(
            "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
        )
    )
    assert any("/rules/" in link for link in found)
