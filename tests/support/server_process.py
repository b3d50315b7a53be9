"""A simulated server in a process of its own, that answers as `vllm serve` does: to be killed, stopped, or cut off."""

import contextlib
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from network_hosts import enter_host
from processes import FORKS
from simulated_servers import SimulatedAdapter, SimulatedServer

from r3.weight_sync import combine, digest

_PATIENCE_S = 60.0
_AT_ONCE = 6  # tokens
_POLL_S = 2e-3


class ServerProcess:
    """A server at `host:port`, with what a pool's schedules ask of one.

    Args:
        host, port: its address.
        namespace: of the host that it is on; None for this machine's own network.
        seconds: of a token.
    """

    def __init__(self, host: str, port: int, namespace: str | None, seconds: float) -> None:
        self.url = f"http://{host}:{port}"
        self.process = SimpleNamespace(poll=lambda: None if self._process.is_alive() else -9)
        self._given = (host, port, namespace, seconds)
        self.start()

    def start(self) -> None:
        self._end, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=_run, args=(theirs, *self._given), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self) -> None:
        self.held()

    def close(self) -> list[str]:
        self._process.kill()
        self._process.join()
        self._end.close()
        return []

    def healthy(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int, *, core: bool = False) -> None:
        """Send a signal to the process; or to the engine core alone, below the HTTP server."""
        with contextlib.suppress(ProcessLookupError, OSError):
            if not core or number == signal.SIGCONT:
                os.kill(self.pid, number)
            if core or number == signal.SIGCONT:
                self._end.send(("signal", number))

    def held(self) -> dict[str, Any]:
        """What its worker holds: `version`, `digest` of all tensors, `state`, `cause`; whether it `serves`.

        Of one that stands still, once it goes on.
        """
        self._end.send(("held", 0))
        if not self._end.poll(_PATIENCE_S):
            raise TimeoutError(f"{self.url} does not say what it holds")
        return self._end.recv()


def _run(end: Connection, host: str, port: int, namespace: str | None, seconds: float) -> None:
    if namespace is not None:
        enter_host(namespace)
    server = SimulatedServer(f"{host}:{port}")
    http = _Http((host, port), server, seconds)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    with contextlib.suppress(EOFError):  # of the process that started this one
        while True:
            match end.recv():
                case "signal", signal.SIGKILL:
                    break
                case "signal", number:
                    server.signal(number, core=True)
                case "held", _:
                    worker = server.worker
                    held = combine({name: digest(tensor) for name, tensor in worker.held.items()})
                    said = {"version": worker.version, "digest": held, "state": str(worker.state.value)}
                    end.send(said | {"cause": worker.cause, "serves": server.serves})
    os._exit(0)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], server: SimulatedServer, seconds: float) -> None:
        super().__init__(address, _Handler)
        self.simulated, self.seconds = server, seconds

    def handle_error(self, *args: Any) -> None: ...  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}"))

    def log_message(self, format: str, *args: Any) -> None: ...

    def _answer(self, body: dict[str, Any]) -> None:
        try:
            content, status = json.dumps(self._result(self.path.partition("?")[0], body)).encode(), 200
        except Exception as error:
            content, status = f"{type(error).__name__}: {error}".encode(), 500
        with contextlib.suppress(OSError):  # nobody waits for it any more
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def _result(self, path: str, body: dict[str, Any]) -> Any:
        server = self.server.simulated
        adapter = SimulatedAdapter(server)
        match path:
            case "/health":
                return None
            case "/get_world_size":
                return {"world_size": 1}
            case "/is_paused":
                return {"is_paused": not server.ask(lambda: server.serves, path, _PATIENCE_S)}
            case "/pause":
                return adapter.pause(_PATIENCE_S)
            case "/resume":
                return adapter.resume(_PATIENCE_S)
            case "/collective_rpc":
                return {"results": adapter.replies(body["method"], body["args"], _PATIENCE_S)}
            case "/inference/v1/generate":
                return self._generate(body["token_ids"], body["sampling_params"])
            case _:
                return {"success": server.ask(lambda: True, path, _PATIENCE_S)}

    def _generate(self, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """Each token is the number that the server holds."""
        server, tokens = self.server.simulated, []
        for _ in range(sampling["max_tokens"] // _AT_ONCE):
            time.sleep(self.server.seconds * _AT_ONCE)
            while not (server.active and server.serves):
                time.sleep(_POLL_S)
            tokens += [server.weights] * _AT_ONCE
        content = [{"token": f"token_id:{token}", "logprob": -0.5} for token in tokens]
        choice = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "length"}
        choices = [{"index": number, **choice} for number in range(sampling.get("n", 1))]
        return {"prompt_token_ids": prompt, "choices": choices}
