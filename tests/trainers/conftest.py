"""A trainer's tests run where that trainer is installed: `make test-trl`, `test-verl`, `test-skyrl`, `test-swift`."""

from importlib.util import find_spec

PACKAGES = {"trl": "trl", "verl": "verl", "skyrl": "skyrl", "swift": "swift"}

collect_ignore = [folder for folder, package in PACKAGES.items() if find_spec(package) is None]
