"""The trainer on two hosts, its engine on a third: network namespaces with addresses of their own."""

import json
import sys
from pathlib import Path

import pytest
from network_hosts import Hosts, needs_hosts
from places import DEMO_MODEL
from pool_servers import PoolServer, server_config

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900), needs_hosts]

EXAMPLE = DEMO_MODEL.parent / "grpo_demo.py"
PORT, SYNC_PORT = 29_500, 29_600
SMALL = [
    *("trainer.train_batch_size=8", "trainer.updates_per_step=1", "trainer.max_steps=2"),
    *("generator.sampling_params.max_generate_length=24", "trainer.timeout_s=120"),
    *("generator.inference_engine.weight_sync.timeout_s=60", "generator.inference_engine.request_timeout_s=120"),
]


@pytest.fixture(scope="module")
def hosts():
    with Hosts(3) as made:
        yield made


@pytest.fixture
def engine(hosts, tmp_path):
    """A server on the third host. It is asked from there: this machine's own network does not reach it."""
    server = PoolServer(
        server_config("generator.inference_engine.max_num_seqs=256"),
        tmp_path,
        host=hosts.addresses[2],
        prefix=hosts.command(2, []),
    )
    try:
        server.start()
        server.wait()
        yield server
    finally:
        assert not server.close()


def train(hosts, engine, folder: Path, *more: str, steps: int = 2):
    """The demo on the first two hosts, a rank each. Returns return codes and outputs."""
    ranks = []
    for number in range(2):
        launch = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        meet = ["--master-addr", hosts.addresses[0], "--master-port", str(PORT)]
        settings = [
            *SMALL,
            f"generator.inference_engine.addresses=[{engine.url}]",
            f"trainer.output_dir={folder}",
            f"trainer.max_steps={steps}",
            *more,
        ]
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torch.distributed.run",
            *launch,
            *meet,
            str(EXAMPLE),
            *settings,
        ]
        ranks.append(hosts.start(number, command, OMP_NUM_THREADS="1"))
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], outputs


@pytest.mark.parametrize("transport", ["gloo", "files"])
def test_two_trainer_hosts_train_with_an_engine_on_a_third(hosts, engine, tmp_path, transport):
    more = {
        "gloo": f"generator.inference_engine.weight_sync.port={SYNC_PORT}",
        "files": f"generator.inference_engine.weight_sync.folder={tmp_path / 'weights'}",
    }
    codes, outputs = train(
        hosts,
        engine,
        tmp_path / "run",
        f"generator.inference_engine.weight_sync.transport={transport}",
        more[transport],
    )
    assert codes == [0, 0], outputs
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["sync/version"] for step in steps] == [1, 2]
    for step in steps:
        assert 0 < step["logprob_diff/replayed/k3"] < step["logprob_diff/live/k3"]


def test_an_engine_that_cannot_be_reached_is_named_on_every_host(hosts, engine, tmp_path):
    hosts.cut(2)
    try:
        codes, outputs = train(hosts, engine, tmp_path / "run", "generator.inference_engine.weight_sync.transport=gloo")
    finally:
        hosts.heal(2)
    assert all(codes)
    assert f"{hosts.addresses[2]}:{engine.port}" in outputs[0] or engine.url in outputs[0], outputs[0][-3000:]
    assert engine.url in outputs[1], outputs[1][-3000:]


def test_a_port_that_is_taken_is_named(hosts, engine, tmp_path):
    busy = hosts.start(0, [sys.executable, "-c", HOLD, hosts.addresses[0], str(SYNC_PORT)])
    assert busy.stdout.readline() == "listening\n"
    codes, outputs = train(
        hosts,
        engine,
        tmp_path / "run",
        "generator.inference_engine.weight_sync.transport=gloo",
        f"generator.inference_engine.weight_sync.port={SYNC_PORT}",
    )
    assert all(codes)
    assert f"a free port, by which workers reach it, got {hosts.addresses[0]}:{SYNC_PORT}" in outputs[0]


HOLD = """
import socket, sys, time
held = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", flush=True)
time.sleep(600)
"""
