"""A request that a paused engine rejects waits until it is resumed, and no rollout is lost; other errors are raised."""

import asyncio
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
from test_collect import SPEC, output, rows

from r3 import CaptureError
from r3.capture import Endpoint, async_rollout
from r3.vllm_compat.server import pauses_queue_requests


def error(message: str, kind: str) -> bytes:
    """As vLLM 0.33 answers with status 503, without a header that says when to come again."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": 503}}).encode()


PAUSED = error("Generation is paused. Please retry after it resumes.", "ServiceUnavailableError")
FULL = error("The engine is currently busy and cannot accept new requests.", "Service Unavailable")


class Answers(BaseHTTPRequestHandler):
    """Each answer of the server's list once, then its last one for ever."""

    def do_POST(self) -> None:
        self.server.asked.append(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as made:
        Thread(target=made.serve_forever, daemon=True).start()
        made.asked, made.url = [], f"http://127.0.0.1:{made.server_port}"
        yield made
        made.shutdown()


def test_a_request_waits_for_the_end_of_a_pause(server):
    server.answers = [(503, PAUSED)] * 3 + [(200, b'{"choices": []}')]
    found = Endpoint(url=server.url, timeout_s=20).ask("/v1/completions", {"prompt": [3, 5, 7]})
    assert found == {"choices": []}
    assert server.asked == [b'{"prompt": [3, 5, 7]}'] * 4


def test_a_pause_without_end_is_told_at_the_deadline(server):
    server.answers = [(503, PAUSED)]
    start = time.monotonic()
    with pytest.raises(CaptureError, match=r"rejected the request for 1 s .*Generation is paused.*a complete sync"):
        Endpoint(url=server.url, timeout_s=1).ask("/v1/completions", {})
    assert time.monotonic() - start < 5
    assert 2 <= len(server.asked) <= 8, "neither given up at once, nor asked without a wait"


@pytest.mark.parametrize(
    "answer",
    [(503, FULL), (503, b""), (503, b"<html>no upstream"), (503, b'["a"]'), (503, b'{"error": "x"}'), (500, PAUSED)],
)
def test_other_errors_are_raised_at_once(server, answer):
    server.answers = [answer]
    with pytest.raises(CaptureError, match=f"answered with status {answer[0]}"):
        Endpoint(url=server.url, timeout_s=20).ask("/v1/completions", {})
    assert len(server.asked) == 1


class Rejected(Exception):
    """Stands for `vllm.exceptions.RetryableRequestError`, which releases up to 0.31 lack."""


class Engine:
    """Gives one completion's first tokens, then rejects the request, so many times; then gives it to its end."""

    def __init__(self, rejections: int) -> None:
        self.rejections, self.asked = rejections, 0

    async def generate(self, prompt, sampling_params, request_id):
        self.asked += 1
        whole = output(rows())
        if self.asked <= self.rejections:
            # One sample of several may be under way when the next is rejected.
            (begun,) = output(rows()).outputs
            begun.token_ids, begun.logprobs, begun.routed_experts = begun.token_ids[:1], begun.logprobs[:1], None
            yield SimpleNamespace(**vars(whole) | {"outputs": [begun]})
            raise Rejected("Generation is paused. Please retry after it resumes.")
        yield whole


@pytest.fixture
def rejects(monkeypatch):
    import vllm.exceptions

    monkeypatch.setattr(vllm.exceptions, "RetryableRequestError", Rejected, raising=False)


def rollout_of(engine: Engine, **more):
    sampling = SimpleNamespace(output_kind=SimpleNamespace(name="CUMULATIVE"), routed_experts_prompt_start=None)
    return asyncio.run(async_rollout(engine, "prompt", sampling, SPEC, request_id="r", **more))


def test_a_rejected_rollout_begins_anew(rejects):
    engine = Engine(rejections=2)
    weights = iter([1, 2, 3])  # what was sampled before a rejection is gone, and its version with it
    (found,) = rollout_of(engine, version=lambda: next(weights))
    (whole,) = output(rows()).outputs
    assert engine.asked == 3
    assert found.token_ids == list(whole.token_ids)
    assert found.weight_versions == (3,)


def test_an_engine_that_stays_paused_is_told(rejects):
    engine = Engine(rejections=10**6)
    with pytest.raises(CaptureError, match=r"request r: the engine rejected it for 0\.5 s \(Generation is paused"):
        rollout_of(engine, paused_timeout_s=0.5)
    assert 2 <= engine.asked <= 6


def test_a_server_queues_in_every_mode_of_a_pause(monkeypatch):
    from vllm.v1.engine.core_client import AsyncMPClient

    before = getattr(AsyncMPClient, "pause_generation_async", None)
    with pauses_queue_requests():
        assert getattr(AsyncMPClient, "pause_generation_async", None) in (None, AsyncMPClient.pause_scheduler_async)
    assert getattr(AsyncMPClient, "pause_generation_async", None) is before

    async def rejecting(self, mode, clear_cache):
        raise AssertionError

    monkeypatch.setattr(AsyncMPClient, "pause_generation_async", rejecting, raising=False)
    with pauses_queue_requests():
        assert AsyncMPClient.pause_generation_async is AsyncMPClient.pause_scheduler_async
    assert AsyncMPClient.pause_generation_async is rejecting
