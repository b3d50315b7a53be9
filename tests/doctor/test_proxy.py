"""A proxy of the environment: what r3 asks goes by it or not, and errors and `doctor` say so."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from r3 import CaptureError, SyncError
from r3.capture import Endpoint
from r3.doctor.server_checks import server_checks
from r3.proxy import is_this_machine, proxy_of, proxy_of_others
from r3.weight_sync import engine_of

ANSWERS = {
    "/version": {"version": "0.30.0"},
    "/health": None,
    "/v1/models": {"data": [{"id": "m"}]},
    "/openapi.json": {"paths": {}},
}
REMOTE = "http://gpu-node.invalid:8000"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUEST_METHOD")


class Asked(BaseHTTPRequestHandler):
    """A vLLM server or, for whole URLs, a proxy that knows no such host."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("http://"):
            status, body = self.server.refusal
        elif self.path in ANSWERS:
            status, body = 200, b"" if ANSWERS[self.path] is None else json.dumps(ANSWERS[self.path]).encode()
        else:
            status, body = 404, b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def serve():
    """Starts a server on a free port of this machine."""
    running = []

    def start(refusal: tuple[int, bytes] = (503, b"cannot resolve host")) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
        server.asked, server.refusal = [], refusal
        Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("refusal", [(503, b"cannot resolve host"), (403, b"{}"), (404, b""), (200, b"<html>log in")])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_errors_name_the_proxy_between_and_not_its_password(serve, environment, refusal, variable):
    proxy = serve(refusal)
    environment.setenv(variable, f"http://me:secret@127.0.0.1:{proxy.server_port}")
    said = (
        rf"The request went through the proxy http://127\.0\.0\.1:{proxy.server_port} \(of {variable}\), which may be "
        r"what failed or answered.*export NO_PROXY=gpu-node\.invalid"
    )
    with pytest.raises(CaptureError, match=said) as caught:
        Endpoint(url=REMOTE, timeout_s=5).version()
    assert "secret" not in str(caught.value)
    with pytest.raises(SyncError, match=said):
        engine_of(REMOTE).call("r3_status", timeout_s=5)
    assert proxy.asked[0] == f"{REMOTE}/version"
    assert len(proxy.asked) >= 2


def test_a_proxy_that_is_not_there_is_named(environment):
    environment.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(CaptureError, match=r"no answer from .*through the proxy http://127\.0\.0\.1:9"):
        Endpoint(url=REMOTE, timeout_s=5).version()
    environment.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(CaptureError, match=r"through the proxy socks5://127\.0\.0\.1:9"):
        Endpoint(url=REMOTE, timeout_s=5).version()


def test_this_machine_is_asked_directly_and_doctor_warns_of_other_clients(serve, environment):
    proxy, server = serve(), serve()
    for variable in ("http_proxy", "all_proxy"):
        environment.setenv(variable, f"http://127.0.0.1:{proxy.server_port}")
        for host in ("127.0.0.1", "localhost"):
            endpoint = Endpoint(url=f"http://{host}:{server.server_port}", timeout_s=5)
            assert endpoint.version() == "0.30.0"
            checks = {check.name: check for check in server_checks(endpoint, None, sync=False)}
            assert checks["server"].status == "ok"
            assert checks["server proxy"].status == "warning"
            assert f"go through http://127.0.0.1:{proxy.server_port} (of {variable})" in checks["server proxy"].detail
            assert "NO_PROXY=" in checks["server proxy"].remedy
            assert host in checks["server proxy"].remedy
        environment.delenv(variable)
    environment.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    environment.setenv("no_proxy", "localhost,127.0.0.1")
    names = [check.name for check in server_checks(endpoint, None, sync=False)]
    assert "server proxy" not in names
    assert not proxy.asked


def test_doctor_says_which_proxy_stands_before_a_server_elsewhere(serve, environment):
    proxy = serve()
    environment.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    between, health = server_checks(Endpoint(url=REMOTE, timeout_s=5), None, sync=False)
    assert (between.name, between.status, health.status) == ("server proxy", "warning", "problem")
    assert f"go through http://127.0.0.1:{proxy.server_port} (of HTTP_PROXY)" in between.detail
    assert "The request went through the proxy" in health.detail


def test_which_proxy_is_between_is_what_the_standard_library_takes(environment):
    environment.setenv("http_proxy", "lower:1")
    environment.setenv("HTTP_PROXY", "upper:1")
    environment.setenv("all_proxy", "all:1")
    assert proxy_of("http://node:80") == "lower:1 (of http_proxy)"
    assert proxy_of("https://node") is None
    assert proxy_of_others("https://node") == "all:1 (of all_proxy)"
    for exempt, host, free in (
        ("*", "node", True),
        ("example.org", "a.example.org", True),
        (".example.org", "a.example.org:8000", True),
        ("node:8000", "node:8000", True),
        ("node", "nodes", False),
        ("10.0.0.0/8", "10.1.2.3", False),  # as httpx and requests read it, and the standard library does not
    ):
        environment.setenv("no_proxy", exempt)
        assert (proxy_of(f"http://{host}") is None) == free, (exempt, host)
    for url, here in (
        ("http://127.0.0.1:8000", True),
        ("http://127.8.9.1", True),
        ("http://[::1]:8000", True),
        ("http://0.0.0.0:8000", True),
        ("http://LOCALHOST.:1", True),
        ("http://a.localhost", True),
        ("http://localhost.example.org", False),
        ("http://10.0.0.1", False),
        ("http://[fe80::1]", False),
    ):
        assert is_this_machine(url) == here, url
