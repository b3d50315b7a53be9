"""The tables of metrics in the docs are those that the code declares.

python tests/docs/test_metric_tables.py        # rewrites them
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MARKED = re.compile(r"(<!-- metrics: ([\w-]+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def rewritten(page: Path) -> str:
    """A page with the tables that its markers name."""
    from r3.diagnostics.registry import GROUPS, metric_table

    tables = {group.name: metric_table(group) for group in GROUPS}
    return MARKED.sub(lambda found: found[1] + tables[found[2]] + found[3], page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- metrics:" in page.read_text()], ids=lambda p: p.name)
def test_tables_are_those_of_the_code(page):
    assert page.read_text() == rewritten(page), f"`python tests/docs/test_metric_tables.py` rewrites {page.name}"


def test_each_group_has_its_table_on_one_page():
    from r3.diagnostics.registry import GROUPS

    marked = [name for page in PAGES for _, name, _ in MARKED.findall(page.read_text())]
    assert sorted(marked) == sorted(group.name for group in GROUPS)
    assert sum(page.read_text().count("<!-- metrics:") for page in PAGES) == len(marked), "a marker without its end"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for each in PAGES:
        if (text := rewritten(each)) != each.read_text():
            each.write_text(text)
