"""SkyRL's FSDP policy worker, whose forwards replay the rollouts' routing."""

import contextlib
import logging
from typing import Any

import ray
import torch
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import FSDPPolicyWorkerBase
from skyrl.train.dataset.replay_buffer import Experience
from torch import Tensor, nn

import r3
from r3.errors import ReplayError
from trainer_hooks.feed import RoutingFeed
from trainer_hooks.skyrl.rows import routing_of_microbatch
from trainer_hooks.support import Refusal, require_supported

logger = logging.getLogger("r3")

REFUSALS = (
    Refusal(
        setting="trainer.policy.model.path of a gpt-oss model",
        why="SkyRL exchanges its attention for one that has not been tried with replay",
        cure="Turn moe_enable_routing_replay off for it",
        found=lambda model: model.config.model_type == "gpt_oss",
    ),
)


class RoutingReplayPolicyWorkerBase(FSDPPolicyWorkerBase):
    """Replays in the policy's old log-probabilities and in its training forwards. Its other forwards are live."""

    _feed: RoutingFeed | None = None

    def init_model(self, model_path: str, num_training_steps: int | None = None) -> None:
        super().init_model(model_path, num_training_steps)
        if self._feed is None:
            raise ReplayError("init_model made a policy to which replay was not attached: another SkyRL than expected")

    def _seq_parallel_monkey_patch(self, model: nn.Module, use_parent_class: bool = False) -> None:
        # init_model calls this between making the model and sharding it.
        require_supported("SkyRL", REFUSALS, model)
        replay = r3.attach(model)
        self._feed = RoutingFeed(replay)
        spec = replay.spec
        logger.info("Routing replay: %d layers, %d of %d experts", len(spec.layer_ids), spec.top_k, spec.num_experts)
        super()._seq_parallel_monkey_patch(model, use_parent_class)

    def _forward_micro_batch(self, micro_batch: TrainingInputBatch) -> Any:
        micro_batch.to(torch.cuda.current_device())
        rows, padding = micro_batch.get("rollout_expert_indices"), micro_batch.get("router_padding_mask")
        with self._replayed(rows, padding, micro_batch["attention_mask"]):
            return super()._forward_micro_batch(micro_batch)

    def _forward_backward_micro(self, experience: Experience, *args: Any, **kwargs: Any) -> Any:
        with self._replayed_experience(experience):
            return super()._forward_backward_micro(experience, *args, **kwargs)

    def _forward_micro_with_loss(self, experience: Experience, *args: Any, **kwargs: Any) -> Any:
        with self._replayed_experience(experience):
            return super()._forward_micro_with_loss(experience, *args, **kwargs)

    def _replayed_experience(self, experience: Experience) -> contextlib.AbstractContextManager[None]:
        # SkyRL's method does the same first of all. Rows are checked on the device, where that is fast.
        experience.to_device(torch.cuda.current_device())
        return self._replayed(
            experience.rollout_expert_indices, experience.router_padding_mask, experience.attention_mask
        )

    def _replayed(
        self, rows: Any, router_padding_mask: Tensor | None, attention_mask: Tensor
    ) -> contextlib.AbstractContextManager[None]:
        """Context in which the one forward of a micro-batch is replayed."""
        assert self._feed is not None
        routing = routing_of_microbatch(
            self._feed.replay.spec,
            rows,
            router_padding_mask,
            attention_mask,
            packed=self.model.remove_microbatch_padding,
            sequence_parallel_size=self.model.sequence_parallel_size,
        )
        return self._feed.rows(routing)


RoutingReplayPolicyWorker = ray.remote(num_gpus=1)(RoutingReplayPolicyWorkerBase)
