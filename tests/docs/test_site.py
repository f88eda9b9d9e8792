"""The documentation as MkDocs builds it: complete, without anything that a browser would fetch from elsewhere, and strict."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from grit_lightning import GenerationSettings, GeometryConfig, GritLitModule, callbacks, datamodules
from grit_lightning.distributed.strategies import GritFSDP2Strategy, GritFSDPStrategy
from grit_lightning.forgetting import TextData, ZeroShotTask
from grit_lightning.optimizers import GeometryAdam

pytest.importorskip("material", reason="needs the documentation's packages: make docs, or pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="needs the documentation's packages: make docs, or pip install -e '.[docs]'")

ROOT = Path(__file__).resolve().parents[2]
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
"""Tags that make a browser fetch something, and where they say what."""
FROM_ELSEWHERE = re.compile(r"\s*(?:https?:)?//")
CONFIGURED = [
    *(GritLitModule, GeometryConfig, GenerationSettings, GeometryAdam, TextData, ZeroShotTask),
    *(GritFSDPStrategy, GritFSDP2Strategy),
    *(getattr(callbacks, name) for name in callbacks.__all__ if name != "GeometryCallback"),  # the base of others
    *(kind for kind in vars(datamodules).values() if inspect.isclass(kind) and "__init__" in vars(kind)),
]
"""Classes with settings."""


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build a project with the command of `make docs`."""
    dry_run = subprocess.run(["make", "-C", ROOT, "--dry-run", "docs"], capture_output=True, text=True, check=True)
    (line,) = (line for line in dry_run.stdout.splitlines() if "mkdocs build" in line)
    words = [sys.executable, "-m", "mkdocs", *shlex.split(line.partition("mkdocs ")[2])]
    words += ["--config-file", str(project / "mkdocs.yml"), "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


class Fetched(HTMLParser):
    """Collects what a page makes a browser fetch."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(FETCHED.get(tag, ""))
        if address:
            self.addresses.append(address)


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 14
    for page in pages:
        addresses = Fetched(page).addresses
        assert any(address.endswith(".css") for address in addresses)
        assert [address for address in addresses if FROM_ELSEWHERE.match(address)] == [], page.name
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8")  # would load its program from a server


def test_no_style_sheet_loads_anything_from_elsewhere(site: Path) -> None:
    sheets = sorted(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        addresses = re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", text)
        assert [address for pair in addresses for address in pair if FROM_ELSEWHERE.match(address)] == [], sheet.name


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Last part of the name of each object on a page, with the HTML up to the next one."""
    found = re.split(r'<h\d id="(grit_lightning\.[\w.]+)"', page.read_text(encoding="utf-8"))
    for path, html in zip(found[1::2], found[2::2], strict=True):
        yield path.rpartition(".")[2], html


@pytest.mark.parametrize("kind", CONFIGURED, ids=lambda kind: kind.__name__)
def test_the_configuration_page_has_every_setting(kind: type, site: Path) -> None:
    html = dict(sections(site / "configuration.html"))[kind.__name__]
    shown = re.findall(r"<td>\s*<code>(\w+)</code>\s*</td>", html)
    settings = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    assert settings
    assert [name for name in settings if name not in shown] == []


def test_links_that_lead_nowhere_fail(tmp_path: Path) -> None:
    links = ("nowhere.md", "index.md#nowhere", "/index.html")
    (tmp_path / "docs").mkdir()
    text = "".join(f"[there]({link})\n" for link in links)
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}", encoding="utf-8")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    mine = {"site_name": "mine", "validation": settings["validation"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == len(links), built.stderr
    for link in links:
        assert any(f"'{link}'" in warning for warning in warnings), link
