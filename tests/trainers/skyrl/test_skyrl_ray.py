"""The policy worker as a Ray actor, as SkyRL makes it: class, settings and batch travel to another process."""

import os

import pytest
import ray
import torch
from rollouts import DP_SIZE, of_samples, oracle, scored, settings, training_batch
from trainers.conformance import check_replayed
from workers import ready

from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorker


@pytest.fixture(scope="module")
def cluster():
    paths = [os.path.dirname(__file__), os.environ["PYTHONPATH"]]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": environment, "worker_process_setup_hook": "stand_ins.methods_on_cpu"},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_an_actor_replays_the_batch_that_it_gets():
    cfg = settings()
    actor = RoutingReplayPolicyWorker.options(num_gpus=0).remote(
        cfg=cfg.trainer,
        world_size=1,
        rank=0,
        local_rank=0,
        master_addr="localhost",
        master_port=12345,
        sequence_parallel_size=1,
    )
    ray.get(actor.__ray_call__.remote(ready))  # in place of init_model, which needs a GPU
    batch = training_batch(cfg)
    parts = [ray.put(part) for part in batch.chunk(len(batch) // DP_SIZE)]
    outputs = ray.get([actor.forward.remote(part) for part in parts])
    got = torch.tensor([row["logprobs"] for output in outputs for row in output.loss_fn_outputs])
    trained = ray.get(actor.forward_backward.remote(batch)).loss_fn_outputs
    old = of_samples(batch, got)
    check_replayed(scored(oracle(), old, [torch.tensor(row["logprobs"]) for row in trained[: len(old)]]))
