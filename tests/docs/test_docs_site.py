"""The documentation holds together: the site builds without a warning, every page is in it, every link of README leads
somewhere."""

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
COLUMNS = 140
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)]*))?\)")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
        return
    for part in nav.values() if isinstance(nav, dict) else nav:
        yield from leaves(part)


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_site_builds_without_a_warning(tmp_path):
    """Strict: a link, or an anchor, that leads nowhere is a warning, and so is a page that the nav leaves out."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "reference/settings/index.html").read_text()
    assert "trainer.diagnostics.alarms.k3_stop" in settings
    assert "<td><code>k3</code></td>" in (tmp_path / "reference/metrics/index.html").read_text()
    assert 'id="r3.weight_sync.WeightSync.push"' in (tmp_path / "reference/api/weight_sync/index.html").read_text()


def test_every_page_is_in_the_nav():
    nav = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)
    assert len(nav) == len(set(nav))


def test_links_of_readme_lead_somewhere():
    for target, anchor in LINK.findall(prose(ROOT / "README.md")):
        if "://" in target:
            continue
        assert (ROOT / target).is_file(), target
        assert not anchor or anchor in anchors(ROOT / target), f"{target}#{anchor}"


def test_nothing_points_to_a_page_that_is_gone():
    """Docstrings, messages and the changelog name pages by their path."""
    files = [
        ROOT / "CHANGELOG.md",
        *(f for name in ("r3", "trainer_hooks", "tests") for f in (ROOT / name).rglob("*.py")),
    ]
    named = {(file, path) for file in files for path in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text())}
    assert named
    assert not [f"{file.relative_to(ROOT)}: {path}" for file, path in sorted(named) if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_short(page):
    long = [line for line in prose(page).splitlines() if len(line) > COLUMNS and not line.startswith("|")]
    assert not long


def test_files_that_pages_name_are_there():
    named = re.compile(r"(?<![\w/])(?:tests|examples|benchmarks|scripts|r3|trainer_hooks)/[\w/]+\.(?:py|md)\b")
    gone = {
        f"{page.relative_to(ROOT)}: {path}"
        for page in [ROOT / "README.md", *PAGES]
        for path in named.findall(page.read_text())
        if not (ROOT / path).is_file()
    }
    assert not gone


def test_names_of_r3_that_pages_name_are_there():
    """By their public path; what stands in a module of vLLM's processes alone is not named by its module."""
    named = {
        (page, name)
        for page in [ROOT / "README.md", *PAGES]
        for name in re.findall(r"(?<![\w./-])r3(?:\.[A-Za-z_]\w*)+(?![\w(]*\.html)", page.read_text())
    }
    assert named
    assert not [f"{page.relative_to(ROOT)}: {name}" for page, name in sorted(named) if not leads_somewhere(name)]


def leads_somewhere(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True
