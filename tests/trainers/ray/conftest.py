"""Without Ray no test here is collected: `make test-ray` has an environment with it."""

from trainer_hooks.support import installed_version

if installed_version("ray") is None:
    collect_ignore_glob = ["*.py"]
