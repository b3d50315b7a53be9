"""A trainer's tests run where that trainer is installed: `make test-trl`, `test-verl`, `test-skyrl`, `test-swift`."""

from importlib.util import find_spec

PACKAGES = {"trl": "trl", "verl": "verl", "skyrl": "skyrl", "swift": "swift"}

# The folders here are namespace packages of these names: they have no origin.
collect_ignore = [
    folder for folder, package in PACKAGES.items() if (found := find_spec(package)) is None or not found.origin
]
