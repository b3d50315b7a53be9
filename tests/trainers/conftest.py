"""A trainer's tests run where that trainer is installed: `make test-trl`, `test-verl`, `test-skyrl`, `test-swift`."""

from trainer_hooks.support import installed_version

# Not by whether it can be imported: `examples/` has folders of these names.
PACKAGES = {"trl": "trl", "verl": "verl", "skyrl": "skyrl", "swift": "ms-swift"}

collect_ignore = [folder for folder, package in PACKAGES.items() if installed_version(package) is None]
