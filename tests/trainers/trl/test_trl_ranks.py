"""TRL on two ranks, an engine in each or one over both, sharded by FSDP2; and with a server."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import DEMO_MODEL
from trainers.conformance import EQUAL
from trl_runs import check
from vllm_server import running_server

import r3

pytestmark = [pytest.mark.engine, pytest.mark.long]
RUNS = Path(__file__).with_name("trl_runs.py")
FSDP2 = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}}


def ranks(count: int, folder: Path, **settings) -> list[dict]:
    """The results of `trl_runs.main` on each rank."""
    given, result = folder / "settings.json", folder / "result.pt"
    given.write_text(json.dumps(settings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command = [*launcher, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    paths = [str(RUNS.parent), str(RUNS.parents[1]), os.environ["PYTHONPATH"]]
    done = subprocess.run(
        [*command, str(RUNS), str(given), str(result)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(f"{result}.{rank}", weights_only=False) for rank in range(count)]


def check_ranks(results: list[dict], equal: float = EQUAL) -> None:
    for result in results:
        check(result["scored"], result["log"], equal)


@pytest.mark.parametrize(
    "settings",
    [{}, {"vllm_tensor_parallel_size": 2}, FSDP2, {"kind": "rloo"}, {"top_k": 20, "top_p": 0.9, **FSDP2}],
    ids=["data-parallel", "tensor-parallel", "fsdp2", "rloo", "fsdp2-truncated"],
)
def test_two_ranks_with_engines_in_them(tmp_path, settings):
    check_ranks(ranks(2, tmp_path, **settings))


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("settings", [{}, {"kind": "rloo", **FSDP2}], ids=["data-parallel", "fsdp2-rloo"])
def test_two_gpus(tmp_path, settings):
    results = ranks(2, tmp_path, use_cpu=False, **settings)
    print(*(f"{each.replayed:.1e}/{each.live:.1e}" for result in results for each in result["scored"]))
    check_ranks(results, 1e-3)  # beside a plain model on the CPU


@pytest.mark.parametrize(("count", "sampling"), [(1, {}), (2, {}), (2, {"top_k": 20, "top_p": 0.9})])
def test_a_server_answers_for_all_ranks(tmp_path, monkeypatch, count, sampling):
    with server(tmp_path, monkeypatch, **sampling) as url:
        check_ranks(ranks(count, tmp_path, vllm_mode="server", vllm_server_base_url=url, **sampling))


def test_each_rank_sends_its_part_to_a_server(tmp_path, monkeypatch):
    gloo = {"given": {"weight_sync_kwargs": {"transport": "gloo"}}}
    with server(tmp_path, monkeypatch) as url:
        results = ranks(2, tmp_path, vllm_mode="server", vllm_server_base_url=url, **gloo, **FSDP2)
    check_ranks(results)
    sent = [result["sent"] for result in results]
    assert max(sent) < 0.6 * sum(sent)


@contextlib.contextmanager
def server(folder, monkeypatch, **sampling):
    """The address of a server of the demo's model, which cuts as `sampling` says."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")  # TRL and r3 sync through its development routes
    cut = [f"generator.sampling_params.{name}={value}" for name, value in sampling.items()]
    config = r3.R3Config.from_overrides(
        ["generator.inference_engine.max_model_len=256", *cut], {"trainer.policy.model.path": str(DEMO_MODEL)}
    )
    with running_server(config, folder) as started:
        yield started.url
