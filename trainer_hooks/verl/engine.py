"""verl's FSDP engine with replay. With `router_replay.mode=disabled` it does what its base class does."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import get_ulysses_sequence_parallel_rank
from verl.workers.engine import FSDPEngineWithLMHead

import r3
from r3.errors import ReplayError
from r3.parallel import RankBarrier, ulysses
from r3.replay.context import KEYWORD
from r3.routing import RolloutRouting
from trainer_hooks.support import Seam, require_seams, require_supported
from trainer_hooks.verl.mode import KEY, REFUSALS, replay_mode
from trainer_hooks.verl.rows import packed_routing, padded_routing, token_mask

logger = logging.getLogger("r3")

ROLLOUT_KEY = "actor_rollout_ref.rollout.enable_rollout_routing_replay"
BYPASS_KEY = "algorithm.rollout_correction.bypass_mode"
METRIC = "actor/replayed_rows"
"""Part of a micro-batch's tokens whose routing was replayed; others are padding, last tokens, or were not captured."""
_FIELD = "routed_experts"  # of verl's batches and model outputs, int16 and jagged [B, ., L, K]


def _seams() -> list[Seam]:
    from verl.workers.engine_workers import ActorRolloutRefWorker  # imports this module's engines

    overridden = {
        "_build_fsdp_module": ("module",),
        "prepare_model_inputs": ("micro_batch",),
        "prepare_model_outputs": ("output", "output_args", "micro_batch", "logits_processor_func"),
        "forward_step": ("micro_batch", "loss_function", "forward_only"),
        "disable_adapter": (),
        "_gather_and_unpad_packed": ("tensor", "pad_size"),
    }
    base, worker = FSDPEngineWithLMHead, ActorRolloutRefWorker
    return [
        *(
            Seam(where=f"{base.__name__}.{name}", target=getattr(base, name, None), parameters=parameters)
            for name, parameters in overridden.items()
        ),
        Seam(
            where=f"{worker.__name__}.set_dispatch_collect",
            target=getattr(worker, "set_dispatch_collect", None),
            parameters=("mesh_name",),
        ),
    ]


class RoutingReplayEngine(FSDPEngineWithLMHead):
    """An engine whose forwards take the routing that is in the batch (R3) or that they record themselves (R2).

    Live, as in verl's other engines: a `forward_only` engine, which is the reference, and forwards without the adapter,
    which are the reference where the actor has one.

    Attributes:
        replay: the handle of `r3.attach`; None where nothing is replayed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode_of_replay = replay_mode(self.engine_config)
        self.replay: r3.Replay | None = None
        self._without_adapter = False
        self._recorder: Any = None
        self._warned = False
        if self.mode_of_replay != "disabled":
            require_seams("verl", "0.9.1", _seams())

    def _build_fsdp_module(self, module: Any) -> Any:
        """Attach to what FSDP is to wrap, with LoRA in it: FSDP1 does not let replay in afterwards."""
        patched = "flash" in (self.model_config.hf_config._attn_implementation or "eager")
        if self.mode_of_replay == "disabled":
            if self.use_ulysses_sp and not patched and self.rank == 0:
                logger.warning(
                    "ulysses_sequence_parallel_size > 1 without FlashAttention: verl splits no other attention, and "
                    "log-probabilities are wrong. Use attn_implementation=flash_attention_2, or set router_replay.mode "
                    "in this engine's fsdp_config: with it r3 splits any attention (a reference stays live)"
                )
            return super()._build_fsdp_module(module)
        if not self.engine_config.forward_only:
            self.replay = r3.attach(module)
        require_supported(f"verl ({KEY}={self.mode_of_replay})", REFUSALS, self)
        if self.use_ulysses_sp and not patched:
            ulysses(module, self.ulysses_parallel_group, barrier=RankBarrier())
        return super()._build_fsdp_module(module)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Also turns replay off: without its adapter the actor is the reference."""
        self._without_adapter = True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._without_adapter = False

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if self.replay is None or self._without_adapter:
            return super().forward_step(micro_batch, loss_function, forward_only)
        if self.mode_of_replay == "R3" or not forward_only:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
            report = self.replay.last
            assert report is not None
            rows = report.rows_replayed + report.rows_live
            output["metrics"] = output["metrics"] | {METRIC: report.rows_replayed / rows}
            return loss, output
        try:
            with r3.record(self.replay.model) as self._recorder:
                return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self._recorder = None

    def prepare_model_inputs(self, micro_batch: Any) -> Any:
        inputs, outputs = super().prepare_model_inputs(micro_batch)
        rows = micro_batch.get(_FIELD, None)
        if self.replay is None:
            self._tell_of_unused(rows)
        elif self._recorder is not None:
            if rows is not None:
                raise ReplayError(
                    f"{KEY}=R2 with {ROLLOUT_KEY}=True: R2 replays the trainer's own routing, and the batch brings the "
                    f"rollout's. Set {ROLLOUT_KEY}=False, or the mode to R3"
                )
        elif not self._without_adapter:
            inputs[KEYWORD] = self._routing(rows, micro_batch, outputs)
        return inputs, outputs

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        """With R2 the old log-probabilities bring their routing with them, which verl carries to the update."""
        outputs = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if self._recorder is not None:
            input_ids = micro_batch["input_ids"]
            ids = self._recorder.expert_ids.to(torch.int16)
            if _is_packed(micro_batch):
                # As bytes, since NCCL has no 16-bit integers.
                gathered = self._gather_and_unpad_packed(ids[0].contiguous().view(torch.uint8), output_args["pad_size"])
                values = gathered.contiguous().view(torch.int16)
            else:
                values = ids[token_mask(input_ids)]
            outputs[_FIELD] = torch.nested.nested_tensor_from_jagged(values, input_ids.offsets())
        return outputs

    def _routing(self, rows: Any, micro_batch: Any, output_args: dict) -> RolloutRouting:
        assert self.replay is not None
        if rows is None:
            cure = (
                f"Set {ROLLOUT_KEY}=True, with a rollout engine that captures"
                if self.mode_of_replay == "R3"
                else f"It is recorded with the old log-probabilities: set {BYPASS_KEY}=False"
            )
            raise ReplayError(f"{KEY}={self.mode_of_replay}, and the actor's batch has no `{_FIELD}`. {cure}")
        input_ids = micro_batch["input_ids"]
        if not _is_packed(micro_batch):
            return padded_routing(self.replay.spec, rows, input_ids)
        routing = packed_routing(self.replay.spec, rows, input_ids, output_args["pad_size"])
        if self.use_ulysses_sp:
            routing = routing.shard(get_ulysses_sequence_parallel_rank(), self.ulysses_sequence_parallel_size)
        return routing

    def _tell_of_unused(self, rows: Any) -> None:
        if rows is None or self._warned or self.engine_config.forward_only or self.rank != 0:
            return
        self._warned = True
        logger.warning(
            "%s=True and %s=disabled: the rollout's routing is captured and carried, and not replayed. Set "
            "+%s=R3 to replay it",
            ROLLOUT_KEY,
            KEY,
            KEY,
        )


def _is_packed(micro_batch: Any) -> bool:
    return tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
