"""SkyRL's policy worker in this process, on the CPU, without Ray and without FSDP."""

from types import SimpleNamespace

import stand_ins  # noqa: F401  (before SkyRL)
from places import DEMO_MODEL
from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper

from trainer_hooks.skyrl.worker import RoutingReplayPolicyWorkerBase


class Strategy:
    """What the worker's methods call of SkyRL's strategy, for one rank."""

    def backward(self, loss, model, optimizer):
        loss.backward()

    def all_reduce(self, metrics, op, group):
        return metrics


def bare_worker(cls, cfg):
    """A worker of one rank, without a model."""
    worker = cls(
        cfg=cfg.trainer,
        world_size=1,
        rank=0,
        local_rank=0,
        master_addr="localhost",
        master_port=12345,
        sequence_parallel_size=1,
    )
    alone(worker)
    return worker


def alone(worker) -> None:
    worker.strategy = Strategy()
    worker.device_mesh = SimpleNamespace(get_group=lambda name: None)
    worker.mesh_rank = SimpleNamespace(dp_size=1)
    worker.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])


def wrapper(packed=False, **options):
    """SkyRL's model. It asks for flash attention when it packs; plain attention tells packed rows apart as well."""
    model = HFModelWrapper(str(DEMO_MODEL), use_flash_attention_2=False, bf16=False, **options)
    model.remove_microbatch_padding = packed
    return model


def policy_worker(cfg, packed=False, cls=RoutingReplayPolicyWorkerBase, **options):
    worker = bare_worker(cls, cfg)
    ready(worker, packed, **options)
    return worker


def ready(worker, packed=False, **options) -> None:
    """What `init_model` does, but for FSDP and the optimizer."""
    alone(worker)
    model = wrapper(packed, **options)
    worker._seq_parallel_monkey_patch(model=model.model)
    worker.model = model
