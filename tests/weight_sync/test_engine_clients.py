"""What the engines' adapters do without an engine: missing ranks, deadlines, guards, and what they refuse."""

import asyncio
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from r3 import SyncError
from r3.weight_sync.engines import engine_of
from r3.weight_sync.engines.deadline import Deadline, answer_of
from r3.weight_sync.engines.engine import require_complete
from r3.weight_sync.engines.request_guard import Guard


def reply(dp_rank: int, rank: int, dp_size: int = 2, world_size: int = 2) -> dict:
    return {"dp_rank": dp_rank, "rank": rank, "dp_size": dp_size, "world_size": world_size, "version": None}


ALL = [reply(d, r) for d in range(2) for r in range(2)]


def test_missing_ranks_are_named():
    require_complete(ALL, "here", "the remedy")
    require_complete(ALL + ALL, "two replicas", "the remedy")
    with pytest.raises(SyncError, match=r"(?s)on each of 2 .*got 2:.*rank 1, worker rank 0: 0 of 1.*\nthe remedy"):
        require_complete(ALL[:2], "here", "the remedy")
    with pytest.raises(SyncError, match=r"data-parallel rank 1, worker rank 1: 0 of 1 replies$"):
        require_complete(ALL[:3], "here", "the remedy")
    with pytest.raises(SyncError, match="worker rank 1: 1 of 2 replies"):
        require_complete(ALL + ALL[:3], "here", "the remedy")
    with pytest.raises(SyncError, match="unexpected: data-parallel rank 2"):
        require_complete([*ALL, reply(2, 0)], "here", "the remedy")
    alone = reply(0, 0, dp_size=1, world_size=1)
    require_complete([*ALL, alone, alone], "engines of two shapes", "the remedy")
    with pytest.raises(SyncError, match=r"(?s)1 workers on each of 2 .*rank 1, worker rank 0: 0 of 1.*\nthe remedy"):
        require_complete([*ALL, reply(0, 0, world_size=1)], "here", "the remedy")
    with pytest.raises(SyncError, match="expected dictionaries with rank"):
        require_complete([{"version": 1}], "here", "the remedy")
    with pytest.raises(SyncError, match="expected dictionaries with rank"):
        require_complete([], "here", "the remedy")


class TwoCores:
    """The part of vLLM's data-parallel client that is used: two engine cores, of which the second may differ."""

    def __init__(self) -> None:
        self.core_engines = [b"\x00\x00", b"\x01\x00"]
        self.resources = SimpleNamespace(output_queue_task=None)
        self.answers = {}

    async def _call_utility_async(self, method, *args, engine):
        return self.answers.get((method, engine), {"collective_rpc": [{"rank": 0}]}.get(method, True))


@pytest.fixture
def two_cores():
    from r3.weight_sync.engines.async_llm import AsyncEngine

    async def nothing():
        return None

    core = TwoCores()
    llm = SimpleNamespace(
        engine_core=core,
        output_handler=None,
        errored=False,
        vllm_config=SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=1, data_parallel_size=2),
            kv_transfer_config=None,
            model_config=SimpleNamespace(is_multimodal_model=True),
        ),
        reset_mm_cache=nothing,
        reset_encoder_cache=nothing,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield AsyncEngine(llm, "wait", loop), core
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_every_data_parallel_rank_is_asked_and_heard(two_cores):
    engine, core = two_cores
    assert [r["dp_rank"] for r in engine.call("r3_status", timeout_s=5)] == [0, 1]
    engine.reset_caches(5)
    core.answers["reset_prefix_cache", b"\x01\x00"] = False
    with pytest.raises(SyncError, match=r"data-parallel ranks \[1\]"):
        engine.reset_caches(5)
    core.answers["collective_rpc", b"\x01\x00"] = []
    with pytest.raises(SyncError, match="rank 1, worker rank 0: 0 of 1"):
        engine.call("r3_status", timeout_s=5)


def test_a_loop_that_does_not_run_is_told(two_cores):
    from r3.weight_sync.engines.async_llm import AsyncEngine

    engine, _ = two_cores
    with pytest.raises(SyncError, match="runs on no event loop yet"):
        AsyncEngine(engine.engine, "wait").call("r3_status", timeout_s=5)
    still = asyncio.new_event_loop()
    with pytest.raises(SyncError, match="does not run"):
        AsyncEngine(engine.engine, "wait", still).call("r3_status", timeout_s=5)
    still.close()


def test_a_deadline_ends_a_wait_that_nobody_answers():
    never: Future = Future()
    with pytest.raises(SyncError, match=r"here: no answer to this within 0\.2 s"):
        answer_of(never, Deadline(0.2), where="here", operation="this", dead=lambda: None)
    with pytest.raises(SyncError, match="here: it died while this was waited for"):
        answer_of(never, Deadline(60), where="here", operation="this", dead=lambda: "it died")
    with pytest.raises(SyncError, match="timeout_s: expected above 0, got 0"):
        Deadline(0)


def test_a_guard_is_undone_once_and_twice():
    class Target:
        def add_request(self):
            return "added"

    target = Target()
    guard, other = Guard(target), Guard(target)
    guard.allow()
    guard.refuse("first")
    other.refuse("second")
    with pytest.raises(SyncError, match="second"):
        target.add_request()
    guard.allow()
    other.allow()
    assert target.add_request() == "added"
    assert not vars(target)
    target.add_request = lambda: "patched before"
    guard.refuse()
    guard.allow()
    assert target.add_request() == "patched before"


def test_what_is_no_engine_is_refused():
    for wrong in (object(), "localhost:8000", "ftp://host", [], ["http://a:1", "http://a:1/"]):
        with pytest.raises(SyncError, match="engine: expected"):
            engine_of(wrong)
    with pytest.raises(SyncError, match="on_running: expected one of wait, abort, keep, got 'drain'"):
        engine_of("http://127.0.0.1:9", on_running="drain")
    with pytest.raises(SyncError, match="connection failed"):
        engine_of("http://127.0.0.1:9").call("r3_status", timeout_s=5)
    made = engine_of("http://127.0.0.1:9")
    assert engine_of(made) is made


def test_a_server_without_control_routes_is_told_how_to_get_them():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Nothing) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        with pytest.raises(SyncError, match="VLLM_SERVER_DEV_MODE=1"):
            engine_of(f"http://127.0.0.1:{made.server_port}").call("r3_status", timeout_s=10)
        made.shutdown()


@pytest.mark.parametrize("healthy", [False, True])
def test_a_server_that_hides_why_it_fails_is_asked_for_its_health(healthy):
    """As vLLM 0.33 answers when its engine core has died, and when a call of its raises."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    hidden = b'{"error": {"message": "The server had an error while processing your request.", "code": 500}}'

    class Hiding(BaseHTTPRequestHandler):
        def do_GET(self):
            sized = self.path.startswith("/get_world_size")
            self.answer(200 if healthy or sized else 503, b'{"world_size": 1}' if sized else b"")

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(500, hidden)

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Hiding) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        said = r"r3_status failed: The server had an error" if healthy else r"the engine has died in r3_status"
        with pytest.raises(SyncError, match=said):
            engine_of(f"http://127.0.0.1:{made.server_port}").call("r3_status", timeout_s=10)
        made.shutdown()
