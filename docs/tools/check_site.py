"""Look at the built site: every link inside leads somewhere, nothing comes from elsewhere, and in a
browser nothing overflows, is broken, or is left unset, in a wide window and in a narrow one.

``python docs/tools/check_site.py docs/_build/html --pictures docs/_build/pictures``

The browser is Chromium, of the system's packages or at ``ISOFORM_CHROMIUM``. Without one that part
is not done, which is said; with ``ISOFORM_REQUIRE_BROWSER`` it is then a fault.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlsplit

WINDOWS = {"wide": 1280, "narrow": 400}
"""Widths of windows, in pixels."""
HEIGHT = 1600
"""How much of a page a picture shows."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOADS = {
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}
SHEETS = ("stylesheet", "preload", "icon", "modulepreload", "manifest")


@dataclass
class Page:
    """What a page of the site refers to.

    Attributes:
        ids: Where links into it may lead.
        links: Where its links lead, as they are written.
        loads: What a browser fetches to show it.
    """

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.page.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.page.links.append(given["href"])
        if tag == "link" and any(kind in given.get("rel", "") for kind in SHEETS):
            self.page.loads.append(given.get("href", ""))
        self.page.loads += [value for name, value in given.items() if (tag, name) in LOADS]


def read(path: Path) -> Page:
    """What the page at ``path`` refers to."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.page


def link_faults(site: Path) -> Iterator[str]:
    """A line for each link or file that leads nowhere or to elsewhere, where that may not be."""
    pages = {path: read(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        where = path.relative_to(site)
        for load in page.loads:
            parts = urlsplit(load)
            if parts.scheme == "data" or not parts.path:
                continue
            if parts.scheme or parts.netloc:
                yield f"{where}: loads {load}, which is not of this site"
            elif not (path.parent / unquote(parts.path)).is_file():
                yield f"{where}: loads {load}, which is not there"
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{where}: links to {link}, which is not there"
            elif parts.fragment and target.suffix == ".html":
                aim = pages.get(target) or pages.get(site / target.relative_to(site.resolve()))
                if aim is None or unquote(parts.fragment) not in aim.ids:
                    yield f"{where}: links to {link}, where nothing has that name"
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"url\(\s*['\"]?(https?:)?//[^)]*\)", sheet.read_text("utf-8")):
            yield f"{sheet.relative_to(site)}: loads {url}, which is not of this site"


# In a browser.

HARNESS = Path(__file__).with_name("look.html")
"""The page that shows all pages to itself and looks at them."""


FRAME = '<body style="margin:0"><iframe src="/{}" width={} height={} style="border:0">'
FIRST = "/__look__"


def browser() -> str | None:
    """Chromium's program, or None."""
    return os.environ.get("ISOFORM_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class _Server(SimpleHTTPRequestHandler):
    first: bytes

    def do_GET(self) -> None:
        """The site's files, and the page that shows them."""
        if self.path != FIRST:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.first)))
        self.end_headers()
        self.wfile.write(self.first)

    def log_message(self, *said: object) -> None:
        """Say nothing of what is fetched."""


@contextmanager
def served(site: Path, first: str) -> Iterator[str]:
    """The address of a page that is ``first``, with the site beside it."""
    handler = partial(type("_Site", (_Server,), {"first": first.encode()}), directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{FIRST}"
        server.shutdown()


def chromium(program: str, *args: str, limit: float) -> str:
    """What Chromium prints, run without a window and without a network but this machine's."""
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", "--no-first-run"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def seen(site: Path, program: str, pictures: Path | None, top: list[str]) -> list[str]:
    """A line for each fault that the browser sees; pictures of the pages ``top``."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    pages = [page for page in pages if not page.startswith(("_static/", "genindex", "search"))]
    pages = [page for page in pages if page != "py-modindex.html"]
    harness = HARNESS.read_text(encoding="utf-8").replace("WIDTHS", str([*WINDOWS.values()]))
    harness = harness.replace("PAGES", json.dumps([f"/{page}" for page in pages]))
    # Virtual time runs ahead whenever nothing is under way: it ends when all is looked at.
    budget = f"--virtual-time-budget={len(pages) * len(WINDOWS) * 12_000}"
    with served(site, harness) as home:
        dom = chromium(program, "--dump-dom", budget, home, limit=400)
    match = re.search(r'<pre id="found"[^>]*data-done="yes"[^>]*>(.*?)</pre>', dom, re.DOTALL)
    if match is None:
        return ["the browser did not come to an end with the pages"]
    report = json.loads(html.unescape(match[1]))
    if report["looked_at"] != len(pages) * len(WINDOWS):
        return [f"the browser has looked at {report['looked_at']} windows only"]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for page, (name, width) in product(top, WINDOWS.items()):
            target = pictures / f"{page.removesuffix('.html').replace('/', '-')}-{name}.png"
            target.unlink(missing_ok=True)
            size = f"--window-size={max(width, 500)},{HEIGHT}"  # Chromium's are no narrower
            with served(site, FRAME.format(page, width, HEIGHT)) as home:
                shot = (f"--screenshot={target}", size, "--virtual-time-budget=15000")
                chromium(program, *shot, home, limit=90)
            if not target.is_file():
                return [f"no picture was taken of {page}"]
    return [f"{one['page'][1:]} in {one['width']} px: {one['what']}" for one in report["found"]]


def main() -> int:
    """Check the site; 1 where something is wrong with it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path, help="where pictures of the top pages go")
    parser.add_argument("--all", action="store_true", help="pictures of all pages")
    parser.add_argument("--only", nargs="*", help="pictures of these pages")
    asked = parser.parse_args()

    faults = list(link_faults(asked.site))
    print(f"links: {len(faults)} faults")
    program = browser()
    if program is None:
        said = "NOT DONE: no Chromium was found, so no page was looked at in a browser"
        print(said)
        if os.environ.get("ISOFORM_REQUIRE_BROWSER"):
            faults.append(said)
    else:
        every = sorted(
            path.relative_to(asked.site).as_posix() for path in asked.site.rglob("*.html")
        )
        top = [page for page in every if page == "index.html" or page.endswith("/index.html")]
        top = asked.only or (every if asked.all else top)
        visible = seen(asked.site, program, asked.pictures, top)
        print(f"browser: {len(visible)} faults, in windows of {[*WINDOWS.values()]} pixels")
        faults += visible
    for fault in faults:
        print(f"  {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
