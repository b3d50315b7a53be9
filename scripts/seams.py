"""Does a vLLM have what r3 relies on? Reads its sources, and runs nothing of them.

scripts/seams.py                 # of the one that is installed
scripts/seams.py FOLDER          # which holds the package vllm, as an unpacked wheel does
scripts/seams.py vllm==0.33.0    # of a release, which is unpacked for this; vllm alone is the newest
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from r3.vllm_compat.seams import Report, check_seams

ROOT = Path(__file__).parents[1]


def unpack(requirement: str, folder: Path, python: str = sys.executable) -> None:
    """Put the files of a package into `folder`, without what it needs."""
    uv = shutil.which("uv") or str(ROOT / ".venv-uv" / "bin" / "uv")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", python, "--target", str(folder), requirement]
    subprocess.run(command, check=True)


def judged(arguments: list[str]) -> Report:
    if not arguments or Path(arguments[0]).is_dir():
        return check_seams(*map(Path, arguments))
    with tempfile.TemporaryDirectory() as folder:
        unpack(arguments[0], Path(folder))
        print(*(info.name.removesuffix(".dist-info") for info in Path(folder).glob("vllm*.dist-info")))
        return check_seams(Path(folder))


if __name__ == "__main__":
    report = judged(sys.argv[1:2])
    print(*report.unmet, report, sep="\n")
    sys.exit(bool(report.unmet))
