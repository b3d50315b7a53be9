"""What a weight sync asks of an engine, with a real one of each kind: every answer in time, its own, or an error.

The last test of each engine kills it.
"""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
import torch
from sync_helpers import following
from vllm_server import running_server

from r3 import SyncError
from r3.capture import Endpoint, engine_kwargs
from r3.doctor.server_checks import server_checks
from r3.weight_sync import WeightSync
from r3.weight_sync.engines import engine_of
from r3.weight_sync.engines.deadline import in_thread
from r3.weight_sync.engines.engine import Engine

EXACT = [2**53 + 1, 2**63 + 5, 2**64 - 1, -(2**63)]
PROMPT = [3, 5, 7, 11]
DEAD = r"has died|has gone|connection failed"
pytestmark = pytest.mark.release


@contextlib.contextmanager
def environment(**more: str):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in more.items():
            patch.setenv(name, value)
        yield


def settings(demo_config) -> dict:
    return engine_kwargs(demo_config) | {"worker_extension_cls": "echo_worker.EchoWorker"}


class Running:
    """A running engine: its adapter, how to generate, and the process of its engine core."""

    def __init__(self, engine: Engine, generate, core_pid: int) -> None:
        self.engine, self.generate, self.core_pid = engine, generate, core_pid
        self.samples = threading.Event()  # set by each token

    @contextlib.contextmanager
    def stopped(self):
        os.kill(self.core_pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.core_pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def offline(demo_config):
    """Not the session's engine: the last test kills it."""
    from vllm import LLM, SamplingParams

    with environment():
        llm = LLM(**settings(demo_config))

    def generate(tokens: int, timeout_s: float = 60) -> int:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        return len(output.outputs[0].token_ids)

    core = llm.llm_engine.engine_core
    running = Running(engine_of(llm), generate, core.resources.engine_manager.processes[0].pid)
    running.llm = llm
    yield running
    core.shutdown()


@pytest.fixture(scope="module")
def asynchronous(demo_config):
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start():
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings(demo_config)))

    with environment():
        made = asyncio.run_coroutine_threadsafe(start(), loop).result(200)

    async def one(tokens: int) -> int:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        async for output in made.generate({"prompt_token_ids": PROMPT}, sampling, f"{time.monotonic_ns()}"):
            last = output
            running.samples.set()
        return len(last.outputs[0].token_ids)

    def generate(tokens: int, timeout_s: float = 60) -> int:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(one(tokens), timeout_s), loop).result(timeout_s + 1)

    core = made.engine_core
    running = Running(engine_of(made), generate, core.resources.engine_manager.processes[0].pid)
    running.llm, running.loop = made, loop
    yield running
    loop.call_soon_threadsafe(made.shutdown)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


@pytest.fixture(scope="module")
def server(demo_config, tmp_path_factory):
    extra = ("--worker-extension-cls", "echo_worker.EchoWorker")
    with (
        environment(VLLM_SERVER_DEV_MODE="1"),
        running_server(demo_config, tmp_path_factory.mktemp("sync_server"), *extra) as up,
    ):
        model = httpx.get(f"{up.url}/v1/models").json()["data"][0]["id"]

        def generate(tokens: int, timeout_s: float = 60) -> int:
            body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
            body |= {"stream_options": {"include_usage": True}}
            with httpx.stream("POST", f"{up.url}/v1/completions", json=body, timeout=timeout_s) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line.removeprefix("data: "))
                        running.samples.set()
            return last["usage"]["completion_tokens"]

        running = Running(engine_of(f"{up.url}/v1"), generate, engine_core_of(up.process.pid))
        running.server = up
        yield running


def engine_core_of(pid: int) -> int:
    """The child of a server that runs the engine core."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("the server has no engine core")


KINDS = ["offline", "asynchronous", "server"]


@pytest.fixture(params=KINDS, scope="module")
def running(request):
    return request.getfixturevalue(request.param)


@pytest.mark.engine
@pytest.mark.long
class TestEveryKind:
    def test_every_worker_answers(self, running):
        (reply,) = running.engine.call("r3_status", timeout_s=30)
        assert {"rank", "version", "state", "world_size", "dp_rank", "dp_size"} <= reply.keys()
        assert (reply["rank"], reply["world_size"], reply["dp_rank"], reply["dp_size"]) == (0, 1, 0, 1)

    def test_arguments_arrive_exactly(self, running):
        sent = [EXACT, {"name": [[2, 3], "torch.bfloat16"]}, "text", 0.1, None, True]
        (reply,) = running.engine.call("r3_test_echo", *sent, timeout_s=30)
        assert reply["echo"] == sent

    def test_no_such_method(self, running):
        with pytest.raises(SyncError, match=r"worker_extension_cls='r3\.weight_sync\.worker\.WeightSyncWorker'"):
            running.engine.call("r3_nothing", timeout_s=30)
        assert running.engine.call("r3_status", timeout_s=30)

    def test_errors_of_workers_come_back_and_exceptions_raise(self, running):
        (reply,) = running.engine.call("r3_test_error", timeout_s=30)
        assert reply["error"] == "as told"
        with pytest.raises(SyncError, match=r"r3_test_raise failed: .*raised on purpose"):
            running.engine.call("r3_test_raise", timeout_s=30)

    def test_pause_caches_and_label(self, running):
        engine = running.engine
        assert running.generate(4) == 4
        assert engine.pause(30)
        assert not engine.pause(30), "a paused engine was said to serve"
        served: Future = in_thread(lambda: running.generate(4))
        time.sleep(1.5)
        if running.engine.name == "vllm.LLM":
            with pytest.raises(SyncError, match="paused for a weight sync"):
                served.result()
        else:
            assert not served.done(), "a paused engine generated"
        engine.reset_caches(30)
        engine.set_weight_version(7, 30)
        engine.resume(30)
        if running.engine.name != "vllm.LLM":
            assert served.result(60) == 4
        engine.resume(30)
        assert running.generate(4) == 4

    def test_a_stopped_engine_answers_late_and_in_order(self, running):
        with running.stopped():
            start = time.monotonic()
            with pytest.raises(SyncError, match="no answer to r3_test_echo within 1 s"):
                running.engine.call("r3_test_echo", "late", timeout_s=1)
            if running.engine.name != "vllm.LLM":  # whose pause does not ask the engine core
                with pytest.raises(SyncError, match=r"within 0\.2 s"):
                    running.engine.pause(0.2)
            assert time.monotonic() - start < 20
        (reply,) = running.engine.call("r3_test_echo", "next", timeout_s=30)
        assert reply["echo"] == ["next"]
        assert running.generate(4) == 4, "a pause that was given up left the engine paused"


@pytest.mark.engine
@pytest.mark.long
def test_an_llm_must_be_idle(offline):
    from vllm import SamplingParams

    offline.llm.llm_engine.add_request("left", {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=4))
    with pytest.raises(SyncError, match="unfinished requests: finish or abort them"):
        offline.engine.pause(30)
    while offline.llm.llm_engine.has_unfinished_requests():
        offline.llm.llm_engine.step()
    assert offline.engine.pause(30)
    offline.engine.refuse("a sync failed: disk full")
    with pytest.raises(SyncError, match="disk full"):
        offline.generate(1)
    offline.engine.close()
    with pytest.raises(SyncError, match="disk full"):
        offline.generate(1)
    # Another sync's adapter heals it.
    engine_of(offline.llm).resume(30)
    assert "add_request" not in vars(offline.llm.llm_engine)


@pytest.mark.engine
@pytest.mark.long
def test_running_requests_of_a_paused_engine(asynchronous):
    def begun(tokens):
        request = in_thread(lambda: asynchronous.generate(tokens))
        while not asynchronous.llm.output_processor.has_unfinished_requests():
            time.sleep(0.01)
        return request

    engine = asynchronous.engine
    waited = begun(200)
    assert engine.pause(60)
    assert waited.result(30) == 200
    engine.resume(30)

    aborting = engine_of(asynchronous.llm, on_running="abort")
    aborted = begun(450)
    assert aborting.pause(30)
    assert aborted.result(30) < 450
    aborting.resume(30)

    keeping = engine_of(asynchronous.llm, on_running="keep")
    kept = begun(200)
    assert keeping.pause(30)
    # An adapter that would wait must not drain what another has frozen.
    assert not engine.pause(30)
    time.sleep(2)
    assert not kept.done()
    keeping.reset_caches(30)
    keeping.resume(30)
    assert kept.result(60) == 200


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("kind", ["asynchronous", "server"])
def test_a_pause_that_cannot_drain_in_time_is_taken_back(kind, request):
    running = request.getfixturevalue(kind)
    running.generate(2)  # the first batch is slow
    running.samples.clear()
    long = in_thread(lambda: running.generate(450))
    assert running.samples.wait(30)
    with pytest.raises(SyncError, match=r"no answer to (pause_scheduler|/pause|/is_paused)"):
        running.engine.pause(0.2)
    assert not long.done(), "too short to outlast the pause"
    assert running.generate(2, timeout_s=30) == 2
    assert long.result(60) == 450
    assert running.engine.pause(30), "the engine was still paused"
    running.engine.resume(30)


@pytest.mark.engine
@pytest.mark.long
def test_an_async_engine_refuses_after_a_failed_sync(asynchronous):
    assert asynchronous.engine.pause(30)
    asynchronous.engine.refuse("a sync failed: disk full")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        asynchronous.generate(1, timeout_s=10)
    assert "disk full" in f"{caught.value} {caught.value.__cause__}"
    asynchronous.engine.resume(30)
    assert asynchronous.generate(1) == 1


@pytest.mark.engine
@pytest.mark.long
def test_calls_on_the_engines_own_loop_are_refused(asynchronous):
    async def here():
        asynchronous.engine.call("r3_status", timeout_s=30)

    async def beside():
        return await asyncio.to_thread(asynchronous.engine.call, "r3_status", timeout_s=30)

    with pytest.raises(SyncError, match=r"await asyncio\.to_thread\(sync\.push"):
        asyncio.run_coroutine_threadsafe(here(), asynchronous.loop).result(30)
    assert asyncio.run_coroutine_threadsafe(beside(), asynchronous.loop).result(30)


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("transport", ["files", "gloo"])
def test_a_sync_commits_on_engines_of_two_kinds_together(asynchronous, server, weights, transport):
    engines = [asynchronous.llm, server.engine]
    with contextlib.closing(WeightSync(engines, transport=transport, chunk_bytes=1 << 20, timeout_s=60)) as sync:
        receipt = sync.push(weights.items(), version=following(sync))
        again = sync.push(weights.items(), version=following(sync))
    assert (receipt.workers, again.workers, again.digest) == (2, 2, receipt.digest)
    assert asynchronous.generate(2) == server.generate(2) == 2


@pytest.mark.engine
@pytest.mark.long
def test_a_sync_that_one_of_two_engines_cannot_join_leaves_both_serving(asynchronous, server, weights):
    with contextlib.closing(WeightSync([asynchronous.llm, server.engine], timeout_s=3)) as sync:
        with server.stopped(), pytest.raises(SyncError, match=r"http://.*no answer"):
            sync.push(weights.items(), version=following(sync))
        sync.require_committed()
        assert asynchronous.generate(2) == server.generate(2) == 2
        time.sleep(3)  # the lease of what the server was asked to reserve
        sync.push(weights.items(), version=following(sync))


@pytest.mark.engine
@pytest.mark.long
def test_the_doctor_sees_what_a_sync_has_left_in_a_server(server, weights):
    def told():
        checks = {check.name: check for check in server_checks(Endpoint(url=server.server.url), None, sync=True)}
        return checks["server routes"].status, checks["server sync"]

    with contextlib.closing(WeightSync(server.engine, timeout_s=60)) as sync:
        last = list(weights)[-1]
        with pytest.raises(SyncError, match="NaN"):
            sync.push((weights | {last: weights[last] * torch.nan}).items(), version=following(sync))
        routes, check = told()
        assert (routes, check.status) == ("ok", "problem")
        assert "1 workers, poisoned, version " in check.detail
        assert "NaN" in check.detail
        receipt = sync.push(weights.items(), version=following(sync))
        assert told()[1].detail == f"1 workers, idle, version {receipt.version}"
        assert server.generate(2) == 2


@pytest.mark.engine
@pytest.mark.long
def test_bytes_are_refused_over_http(server):
    with pytest.raises(SyncError, match="expected arguments that JSON carries"):
        server.engine.call("r3_test_echo", b"bytes", timeout_s=30)


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_engine_is_noticed_at_once(kind, request):
    """The last test of each engine."""
    running = request.getfixturevalue(kind)
    os.kill(running.core_pid, signal.SIGSTOP)
    waiting = in_thread(lambda: running.engine.call("r3_status", timeout_s=100))
    time.sleep(0.5)
    assert not waiting.done()
    os.kill(running.core_pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(SyncError, match=DEAD):
        waiting.result(60)
    assert time.monotonic() - start < 30
    with pytest.raises(SyncError, match=DEAD):
        running.engine.call("r3_status", timeout_s=100)
    assert time.monotonic() - start < 45
    if kind == "server":
        running.server.kill()  # vLLM's server takes longer to end without its engine core than the fixture waits
