"""docs/reference/engines.md, of what tests/support/engine_families.py measured."""

import fcntl
import json
from pathlib import Path
from typing import Any

import transformers

MEASURED = Path(__file__).parent / "engines.json"
PAGE = Path(__file__).parents[3] / "docs/reference/engines.md"
MARK = "<!-- from here on by tests/support/engine_families.py --page -->\n"

WRONG: dict[str, set[str]] = {
    "ernie4_5_moe": {"selection"},
    "olmoe": {"logprobs"},
    "zaya": {"selection"},
}
"""Families that were measured to be wrong from the start, and for what; docs/reference/engines.md says why."""


def add(name: str, found: dict[str, Any]) -> None:
    """Record a family's figures under the installed versions."""
    import vllm

    key = f"vllm {vllm.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    with MEASURED.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        measured = json.loads(file.read() or "{}")
        measured.setdefault(key, {})[name] = found
        file.truncate(0)
        file.write(json.dumps(measured, indent=1, sort_keys=True) + "\n")


def write_page() -> None:
    """Replace the tables of the page; what stands above them is kept."""
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    measured = json.loads(MEASURED.read_text())
    PAGE.write_text(above + MARK + "".join(_tables(*each) for each in sorted(measured.items())), encoding="utf-8")


def _tables(versions: str, families: dict[str, dict[str, Any]]) -> str:
    started = {name: found for name, found in sorted(families.items()) if found["starts"]}
    others = {name: found for name, found in sorted(families.items()) if not found["starts"]}
    head = (
        "family",
        "run by",
        "rows that differ",
        "k3 live",
        "k3 replayed",
        "with cached prompts",
        "identity sync",
        "not synced",
        "synced",
        "synced again",
        "commit",
    )
    rows = [_row(name, found) for name, found in started.items()]
    reasons = [f"| `{name}` | {found['why'].replace('|', '/')[:160]} |" for name, found in others.items()]
    table = "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])
    refused = "\n".join(["| family | what vLLM says |", "|---|---|", *reasons])
    return (
        f"\n## {versions}, CPU\n\n{table}\n\nNot started on this CPU, by tiny models of these settings:\n\n{refused}\n"
    )


def _row(name: str, found: dict[str, Any]) -> str:
    def k3(when: str) -> str:
        return _figure(found.get(when, {}).get("k3_replayed"))

    start, identity = found.get("start", {}), found.get("identity")
    exact = identity if isinstance(identity, str) else "exact" if identity == 0 else _figure(identity)
    cached = k3("cache") if found.get("cached_tokens") else "not cached"
    share = "-" if not start else f"{100 * start['differing_rows']:.1f}%"
    figures = (share, _figure(start.get("k3_live")), k3("start"), cached, exact, _figure(found.get("stale_k3")))
    last = (k3("changed"), k3("changed_again"), found["commit"])
    return f"| `{name}` | {found['implementation']} | {' | '.join((*figures, *last))} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
