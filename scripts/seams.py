"""Does a vLLM have what r3 relies on? Reads its sources: of the installed one, or below the folder that is given.

scripts/seams.py [FOLDER]    # which holds the package vllm, as an unpacked wheel does
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from r3.vllm_compat.seams import check_seams

report = check_seams(*map(Path, sys.argv[1:2]))
print(*report.unmet, report, sep="\n")
sys.exit(bool(report.unmet))
