"""The page stands alone: no network, no script, every link leads somewhere, and a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_experiments import Study, write_explanations

from maehpc.report import Summary, aggregate

HOSTILE = "<script>alert(1)</script>&\"'"


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids |= {value or "" for name, value in attributes if name == "id"}
        links = [value or "" for name, value in attributes if name in ("href", "src")]
        self.anchors |= {link[1:] for link in links if link.startswith("#")}
        self.links += [link for link in links if not link.startswith("#")]


def test_every_link_is_relative_and_leads_to_a_file(reported: tuple[Path, Summary]) -> None:
    out, summary = reported
    page = Links((out / "index.html").read_text())
    assert {out / link for link in page.links} == set(summary.files) - {out / "index.html"}
    assert page.anchors <= page.ids
    assert "script" not in page.tags
    assert not re.search(r"https?:|//|@import|url\(", (out / "index.html").read_text())


def test_the_page_shows_the_rows(reported: tuple[Path, Summary]) -> None:
    out, summary = reported
    page = (out / "index.html").read_text()
    for cell in summary.text.to_numpy().ravel():
        assert f"<td>{cell}</td>" in page


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    study = Study(name=HOSTILE.replace("/", "-"), classes=(HOSTILE,) * 3)
    write_explanations(tmp_path / "<b>demo", study)
    aggregate(tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert {"script", "b"}.isdisjoint(Links(page).tags)
    assert all((tmp_path / "report" / link).is_file() for link in Links(page).links)


@pytest.mark.slow
def test_a_browser_shows_it(reported: tuple[Path, Summary], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --window-size=1400,4000 --virtual-time-budget=5000"
    page = (reported[0] / "index.html").as_uri()
    picture = tmp_path / "page.png"
    for number, wish in enumerate(([f"--screenshot={picture}"], ["--dump-dom"])):
        command = [browser, *quiet.split(), f"--user-data-dir={tmp_path / str(number)}", *wish, page]
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert result.stdout.count("<img") == 4
    assert "DeepLIFT" in result.stdout
    shown = Image.open(picture).convert("RGB")
    assert shown.size == (1400, 4000)
    colours = shown.getcolors(1 << 24)
    assert colours is not None and len(colours) > 5000  # the figures are there: text alone has a few hundred
