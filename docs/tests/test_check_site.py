"""The look at the site sees what it is for: each fault here is put into a page of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from check_site import browser, link_faults, seen

TEXT = "<h1>Page</h1><p id='here'>" + "words " * 30 + "</p>"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


def site(folder, body):
    (folder / "index.html").write_text(f"<!doctype html><body>{TEXT}{body}</body>")
    (folder / "other.html").write_text(f"<!doctype html><body>{TEXT}</body>")
    return folder


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("<a href='nowhere.html'>x</a>", "nowhere.html, which is not there"),
        ("<a href='other.html#lost'>x</a>", "where nothing has that name"),
        ("<a href='#lost'>x</a>", "where nothing has that name"),
        ("<script src='https://example.org/x.js'></script>", "not of this site"),
        ("<link rel='stylesheet' href='//example.org/x.css'>", "not of this site"),
        ("<img src='lost.png'>", "lost.png, which is not there"),
    ],
)
def test_links_that_lead_nowhere_are_seen(tmp_path, body, says):
    (fault,) = link_faults(site(tmp_path, body))
    assert says in fault


def test_a_site_in_order_has_no_faults(tmp_path):
    body = f"<a href='other.html#here'>x</a><a href='https://example.org'>y</a><img src='{PIXEL}'>"
    assert not list(link_faults(site(tmp_path, body)))


FAULTS = [
    ("<table><td><div style='width:900px'>wide</div></table>", "400 px: is 9"),
    ("<img src='lost.png'>", "no picture"),
    ("<span class='math'>\\(x\\)</span>", "0 of 1 formulas"),
]


@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize(("body", "says"), FAULTS)
def test_a_browser_sees(tmp_path, body, says):
    program = browser()
    assert program is not None
    found = seen(site(tmp_path, body), program, None, [])
    assert found
    assert all(line.startswith("index.html") for line in found)
    assert any(says in line for line in found)


@pytest.mark.skipif(browser() is None, reason="no Chromium")
def test_what_scrolls_by_itself_may_be_wide(tmp_path):
    program = browser()
    assert program is not None
    wide = "<div style='overflow-x:auto'><div style='width:900px'>wide</div></div>"
    assert seen(site(tmp_path, wide), program, tmp_path / "pictures", ["index.html"]) == []
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "index-narrow.png",
        "index-wide.png",
    ]
