"""The stand-ins of `stand_ins.py`, before SkyRL is imported. Without SkyRL no test here is collected."""

import pytest

from trainer_hooks.support import installed_version

if installed_version("skyrl") is None:
    collect_ignore_glob = ["*.py"]  # `make test-skyrl` has an environment with it
else:
    import stand_ins

    @pytest.fixture
    def cpu(monkeypatch):
        stand_ins.methods_on_cpu(monkeypatch.setattr)
