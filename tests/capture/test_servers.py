"""Servers that a run starts, by a stand-in that starts as vLLM's do and never answers."""

import os
import sys
import uuid

import psutil
import pytest

from r3 import R3Config
from r3.capture import running_servers, servers
from r3.errors import CaptureError

STARTS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


@pytest.mark.timeout(20)  # before vLLM would be killed of itself
def test_a_server_that_still_starts_is_not_waited_for(monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setattr(servers, "server_command", lambda config: [sys.executable, "-c", STARTS, mark])
    config = R3Config.from_overrides(["generator.inference_engine.num_engines=1"])
    with pytest.raises(CaptureError, match="not ready after 2 s"), running_servers(config, timeout_s=2.0):
        pass
    others = [each for each in psutil.process_iter(["cmdline"]) if each.pid != os.getpid()]
    assert not [each for each in others if mark in (each.info["cmdline"] or [])]
