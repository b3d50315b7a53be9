"""Where things are, for tests that start other processes."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
DEMO_MODEL = EXAMPLES / "chain_sum_moe"
IMPORTED = (ROOT, TESTS, SUPPORT, TESTS / "faults", EXAMPLES)
"""What tests import from, as `pythonpath` in pyproject.toml has it."""
