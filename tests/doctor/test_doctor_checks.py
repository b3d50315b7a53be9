"""`r3 doctor` on machine, weights, tokenizer, settings and the sync's state: each fault is made, and named."""

import json
import shutil
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from places import DEMO_MODEL
from safetensors.torch import load_file, save_file
from test_doctor import config, found

from r3.doctor import examine, machine
from r3.doctor.sync_checks import sync_state
from r3.doctor.weights import INDEX
from r3.weight_sync import engine_of


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the demo's model that may be spoilt."""
    return shutil.copytree(DEMO_MODEL, tmp_path / "model")


def split(folder) -> None:
    """The weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def weights(folder):
    return found(config(model=folder))["weights"]


def test_complete_weights_are_told_with_their_dtype(checkpoint):
    count = len(load_file(checkpoint / "model.safetensors"))
    whole = weights(checkpoint)
    assert whole.status == "ok"
    assert f"{count} tensors ({count} BF16) in 1 files, complete; {count} of them looked at: finite" in whole.detail
    split(checkpoint)
    assert f"({count} BF16) in 2 files" in weights(checkpoint).detail


def lose(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut(folder):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def misplace(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def mark_unplannable(folder):
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file)


def remove_all(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lose, "model-00002-of-00002.safetensors: the index names it, and it is not there"),
        (cut, "model-00001-of-00002.safetensors: cannot be read (truncated?)"),
        (misplace, "lm_head.weight: the index says model-00002-of-00002.safetensors, which does not hold it"),
        (mark_unplannable, "not finite: model.norm.weight"),
        (remove_all, "has no safetensors files"),
        (lambda folder: (folder / INDEX).write_text("[1"), "expected an object with weight_map: JSONDecodeError"),
        (lambda folder: (folder / INDEX).write_text("[1]"), "expected an object with weight_map: TypeError"),
    ],
)
def test_weights_that_are_not_whole_are_a_problem(checkpoint, fault, message):
    split(checkpoint)
    fault(checkpoint)
    check = weights(checkpoint)
    assert (check.status, message in check.detail) == ("problem", True), check
    assert check.remedy


def no_padding(folder):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"pad_token": None}))


def small_vocabulary(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 300}))


def no_tokenizer(folder):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_padding, "no pad_token"),
        (small_vocabulary, "it has tokens that the model does not know"),
        (no_tokenizer, "has none of tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_tokenizers_that_do_not_fit_are_a_problem(checkpoint, fault, message):
    assert found(config(model=checkpoint))["tokenizer"].status == "ok"
    fault(checkpoint)
    check = found(config(model=checkpoint))["tokenizer"]
    assert (check.status, message in check.detail) == ("problem", True), check


@pytest.mark.parametrize(
    ("name", "value", "status", "message"),
    [
        ("PYTHONDONTWRITEBYTECODE", "1", "warning", "compiles all modules anew"),
        ("NCCL_P2P_DISABLE", "1", "warning", "do not copy to each other directly"),
        ("NCCL_P2P_DISABLE", "0", "ok", "none that is known to hurt"),
        ("NCCL_SOCKET_IFNAME", "nothere7", "problem", "NCCL_SOCKET_IFNAME=nothere7: this host has "),
        ("NCCL_SOCKET_IFNAME", "=l", "problem", "this host has "),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok", ""),
        ("GLOO_SOCKET_IFNAME", "lo", "ok", ""),
    ],
)
def test_variables_that_hurt_are_told(monkeypatch, name, value, status, message):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv(name, value)
    check = found(config(model=""))["environment variables"]
    assert (check.status, message in check.detail) == (status, True), check
    assert (name in check.remedy) == (status == "warning")


def test_chunks_that_do_not_fit_into_shared_memory_are_a_problem():
    large = "generator.inference_engine.weight_sync.chunk_mib=100000000"
    check = found(config(large, model=""))["shared memory"]
    assert (check.status, "two chunks of 1e+08 MiB" in check.detail) == ("problem", True), check
    assert "--shm-size" in check.remedy
    gloo = "generator.inference_engine.weight_sync.transport=gloo"
    assert found(config(large, gloo, model=""))["shared memory"].status == "ok"


def test_the_disk_of_the_run_folder_is_told(tmp_path):
    check = found(config(f"trainer.output_dir={tmp_path}/runs/new/one", model=""))["disk"]
    assert check.status == "ok"
    assert f"{tmp_path}: " in check.detail


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param(
            "generator.inference_engine.weight_sync.transport=nccl",
            "needs a GPU, and there is none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is that there is no GPU"),
        ),
        ("generator.inference_engine.max_model_len=64", "no room for a prompt"),
        ("trainer.policy.sequence_parallel_size=3", "expected a divisor of the 4 query heads, got 3"),
        ("generator.inference_engine.max_model_len=513", "expected at most the model's 512 positions, got 513"),
    ],
)
def test_settings_that_cannot_work_here_are_a_problem(setting, message):
    check = found(config(setting))["settings"]
    assert (check.status, message in check.detail) == ("problem", True), check


def test_an_optional_package_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    check = found(config(model=""))["optional flash-attn"]
    assert (check.status, "undefined symbol: _ZN3c10" in check.detail) == ("problem", True), check
    assert "flash-attn" in check.remedy


def test_gpus_are_told():
    check = found(config(model=""))["gpus"]
    assert check.status in ("ok", "warning")
    assert ("GiB" in check.detail) == torch.cuda.is_available()


def test_the_driver_says_its_version(monkeypatch):
    def version_into(pointer):
        pointer._obj.value = 13010
        return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=version_into))
    assert machine._driver() == "driver for CUDA 13.1"
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda pointer: 100))
    assert machine._driver() == "a driver that fails"


@pytest.fixture
def worker_server():
    """The control routes of a server whose workers are in a state that the test gives."""
    replies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            paths = {"/openapi.json": {"paths": {"/collective_rpc": {}, "/inference/v1/generate": {}}}}
            paths |= {"/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": "0.30.0"}, "/health": None}
            paths |= {f"/get_world_size?include_dp={dp}": {"world_size": len(replies)} for dp in ("true", "false")}
            self.answer(paths[self.path])

        def do_POST(self):
            assert json.loads(self.rfile.read(int(self.headers["Content-Length"])))["method"] == "r3_status"
            self.answer({"results": replies})

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", replies
        server.shutdown()


def reply(rank: int, **changes) -> dict:
    return {"rank": rank, "dp_rank": 0, "world_size": 2, "state": "idle", "cause": "", "version": 4} | changes


@pytest.mark.parametrize(
    ("second", "status", "message"),
    [
        ({}, "ok", "2 workers, idle, version 4"),
        ({"state": "poisoned", "cause": "the disk was full"}, "problem", "must not sample"),
        ({"state": "poisoned", "cause": "the disk was full"}, "problem", "(the disk was full)"),
        ({"version": 3}, "problem", "version 3 and 4: the workers do not have the same weights"),
        ({"version": None}, "problem", "version unknown (none was synced) and 4"),
        ({"state": "open"}, "warning", "idle and open, version 4: a sync is under way"),
    ],
)
def test_states_of_a_servers_workers(worker_server, second, status, message):
    url, replies = worker_server
    replies += [reply(0), reply(1, **second)]
    check = found(config(model=""), url=url)["server sync"]
    assert (check.status, message in check.detail) == (status, True), check
    assert bool(check.remedy) == (status != "ok")


def test_a_server_to_be_synced_into_needs_control_routes(worker_server):
    url, _ = worker_server  # without workers: no world size
    checks = {check.name: check for check in examine(config(model=""), url="http://127.0.0.1:9", sync=True)}
    assert "server sync" not in checks  # nothing answers at all
    checks = {check.name: check for check in examine(config(model=""), url=url, sync=True)}
    assert checks["server sync"].status == "problem"


@pytest.mark.engine
def test_the_workers_of_a_real_engine_are_idle(engine):
    check = sync_state("engine", engine_of(engine), 60)
    assert check.status in ("ok", "warning"), check
    assert check.detail.startswith("1 workers, idle, version ")
