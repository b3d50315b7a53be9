"""The support table in docs/reference/models.md: what the tests of every model found, by version of transformers.

`pytest tests/replay/test_every_model.py --support-table` runs them and adds what it saw to `proved.json`, from which
the page is made.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import transformers

from zoo import CANNOT_RUN, CASES, NOT_REENTRANT, listed

PROVED = Path(__file__).with_name("proved.json")
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "models.md"

_TESTS = {
    "test_own_routing_is_bit_identical_to_live": "exact",
    "test_foreign_ids_reach_the_experts_with_weights_and_gate_gradients_of_the_formula": "formula",
    "test_both_modes_of_checkpointing_give_the_gradients_of_none_over_interleaved_micro_batches": "checkpointing",
    "test_invalid_rows_are_routed_live_in_the_same_batch": "mixed",
    "test_a_family_that_ids_do_not_determine_is_refused_by_name": "refused",
}
_NODE = re.compile(r"::(?P<test>\w+)\[(?P<name>.+?)(?:-(?P<variant>fp32|bf16))?\]$")

_NOTES = {
    "deepseek_v2": "also with group limits: weights come from the scores before the group mask",
    "deepseek_v4": "the hash layers choose by token id: they need no routing, and have no column",
    "ernie4_5_vl_moe": "text only; an input with images raises",
    "jetmoe": "the experts of the MLP; attention heads are routed live. transformers cannot checkpoint it",
    "inkling2_loop": "of one pass (`loop_num_passes=1`); `attach` refuses layers that run several times",
    "inkling2_loop_text": "as `inkling2_loop`",
    "llama4": "transformers 5.24.0 itself cannot run the class with pictures (`image_outputs`)",
    "longcat_flash": "E counts the zero experts",
    "mistral_large4": "in transformers 5.24.0 itself reentrant checkpointing fails",
    "qwen3_omni_moe": "transformers 5.9 names the whole model as its decoder: images are untried there",
    "zaya": "E counts the class that skips the experts",
}

_INTRO = """# Models

What `tests/replay/test_every_model.py` found for every mixture-of-experts family of transformers, each as a whole tiny
model with random weights and correction biases, on the CPU. The page is made by those tests, a column for each release
that they ran with:

    .venv/bin/python -m pytest tests/replay/test_every_model.py --support-table

**yes** is all of this:

- *exact*: replaying its own live routing gives logits bit-identical to live, in float32 and bfloat16, with each of
  transformers' expert implementations that the family has (eager, grouped).
- *formula*: foreign ids reach the experts of every layer as given; the weights equal the family's formula, written
  independently in float64 (`tests/support/zoo/formulas.py`), and the gradient of every gate equals autograd's on it.
- *checkpointing*: both modes give the gradients that none gives, over two micro-batches and one backward, with a live
  and another replayed forward in between.
- *mixed*: rows that are not valid are routed live beside replayed ones.

What is missing, is missing in transformers itself: it cannot run or checkpoint the model in this way. **fails**: every
forward of that release fails, without replay too. Empty: the release does not have the family.

On one H200 (torch 2.11.0+cu130, transformers 5.17.0, commit b8c995a, `--device cuda`, deterministic algorithms) all 409
tests of the 80 models of that version pass as well.

Which of them vLLM's CPU build starts, and whether engine and trainer agree: [engines.md](engines.md).

Variants (`-`) are other routers of a family. A model that is not listed passes or fails on the proof that `attach`
makes.
"""

_REFUSED = """
## Refused
Expert ids do not determine what these routers do. `attach` refuses them by name.
"""


def add(passed: list[str], failed: list[str]) -> None:
    """Record the outcome of tests, by node id, for the installed transformers, and write the page."""
    found: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for node in passed:
        if (match := _NODE.search(node)) and match["test"] in _TESTS:
            found[match["name"]][_TESTS[match["test"]]].append(match["variant"] or "yes")
    if failed or not found:
        raise RuntimeError(f"nothing written: {len(failed)} tests failed, {len(found)} models were proved")
    proved = json.loads(PROVED.read_text()) if PROVED.exists() else {}
    proved[transformers.__version__] = {
        name: {
            "class": CASES[name].architecture,
            **({"reason": CASES[name].refused} if CASES[name].refused else {}),
            **{what: sorted(variants) for what, variants in sorted(checks.items())},
        }
        for name, checks in sorted(found.items())
    }
    PROVED.write_text(json.dumps(proved, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(proved))


def page(proved: dict[str, dict[str, dict]]) -> str:
    """docs/reference/models.md of the outcomes `{transformers version: {case: checks}}`."""
    releases = sorted(proved, key=lambda release: tuple(map(int, release.split("."))))
    replayed, refused = [], []
    for name in sorted({name for found in proved.values() for name in found}):
        results = {release: proved[release].get(name) for release in releases}
        last = next(found for found in reversed(results.values()) if found)
        note = last.get("reason") or _NOTES.get(name) or _NOTES.get(name.partition("-")[0], "")
        cells = (_cell(name, release, found) for release, found in results.items())
        row = f"| `{name}` | {last['class']} | {' | '.join(cells)} | {note} |"
        (refused if "reason" in last else replayed).append(row)

    def table(rows: list[str], last: str) -> str:
        head = ("model type", "class", *releases, last)
        return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]) + "\n"

    return f"{_INTRO}\n{table(replayed, 'note')}{_REFUSED}\n{table(refused, 'reason')}"


def _cell(name: str, release: str, found: dict | None) -> str:
    if found is None:
        return "fails" if listed(CANNOT_RUN, name, release) else ""
    if "reason" in found:
        return "refused"
    exact = [f"no {dtype}" for dtype in ("fp32", "bf16") if dtype not in found.get("exact", ())]
    missing = exact + [f"no {what}" for what in ("formula", "checkpointing", "mixed") if what not in found]
    if listed(NOT_REENTRANT, name, release):
        missing.append("not reentrant")
    return ", ".join(missing) or "yes"
