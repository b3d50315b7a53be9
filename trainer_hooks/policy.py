"""A causal language model under FSDP2 with replay attached, as the trainer updates it and the metrics score it."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import r3
from r3 import numerics
from r3.config import R3Config
from r3.experts import use_experts
from r3.parallel import (
    FusedHead,
    RankBarrier,
    fused_head,
    load_expert_parallel,
    make_mesh,
    parameter_groups,
    shard_parameters,
    ulysses,
)
from r3.routing import prefetch
from r3.weight_sync import LazyWeight, named_weights
from trainer_hooks.batches import Rows, StepBatch
from trainer_hooks.liger import use_liger_norms
from trainer_hooks.schedule import lr_schedule

logger = logging.getLogger("r3")

CPU = torch.device("cpu")


class Policy:
    """A causal language model under FSDP2, with replay attached.

    Args:
        config: settings; `trainer.policy.model.path` is the checkpoint.

    Raises:
        UnsupportedModelError: the model is dense, or its routers cannot be replayed exactly, while the settings ask
            for capture or replay; or `trainer.policy.model.experts_implementation` cannot compute its expert layers, or
            Liger does not know the model.
    """

    def __init__(self, config: R3Config) -> None:
        from transformers import AutoTokenizer

        policy = config.trainer.policy
        if policy.numerics == "matched":
            numerics.prepare()
        self.temperature = config.generator.sampling_params.temperature
        self.fused_experts = config.generator.inference_engine.weight_sync.fused_experts
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
        self.mesh = make_mesh(self.device.type, policy.sequence_parallel_size)
        self.barrier = RankBarrier(timeout_s=config.trainer.timeout_s)
        self.packed = config.trainer.use_sample_packing
        self.micro_batch_tokens = config.trainer.micro_train_batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(policy.model.path)
        self.sliced = self.packed or self.mesh.sequence_size > 1
        self.replay: r3.Replay | None = None
        self.model, self._head = self._load(config, trained=True)
        self._reference = self._load(config, trained=False) if config.trainer.algorithm.kl_coef else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model),
            lr=policy.optimizer_config.lr,
            betas=(0.9, 0.95),
            weight_decay=policy.optimizer_config.weight_decay,
            fused=True,
        )
        self.scheduler = lr_schedule(self.optimizer, policy.optimizer_config, max_steps=config.trainer.max_steps)

    @property
    def reference(self) -> nn.Module | None:
        """The starting checkpoint, for a penalty of the KL to it; None without one."""
        return self._reference[0] if self._reference else None

    def _load(self, config: R3Config, *, trained: bool) -> tuple[nn.Module, FusedHead]:
        """The starting checkpoint under FSDP2 and its head: to train, with replay; or the reference, live and without
        gradients."""
        from transformers import AutoModelForCausalLM

        policy = config.trainer.policy
        fsdp, capture = policy.fsdp_config, config.generator.inference_engine.enable_return_routed_experts
        param_dtype, spread = getattr(torch, fsdp.param_dtype), policy.expert_parallel_size > 1
        if spread:
            model = load_expert_parallel(policy.model.path, policy.expert_parallel_size, param_dtype=param_dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(policy.model.path, dtype=torch.float32).to(self.device)
        use_experts(model, policy.model.experts_implementation)
        # Before sharding, so that a model that cannot be replayed or sliced is refused before anything is built on it.
        if trained and capture:
            self.replay = r3.attach(model, required=fsdp.moe_enable_routing_replay)
        head = fused_head(model)
        if trained and policy.numerics == "matched":
            numerics.match_engine(model, head)
        if self.sliced:
            ulysses(model, self.mesh.sequence_group, barrier=self.barrier if dist.get_world_size() > 1 else None)
        if trained and fsdp.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if policy.model.use_liger_kernel:
            use_liger_norms(model)
        sharded = model if spread else shard_parameters(model, self.mesh, param_dtype=param_dtype)
        if not trained:
            sharded.eval().requires_grad_(False)
            if dist.get_rank() == 0:
                logger.warning(
                    "trainer.algorithm.kl_coef=%g: the reference, %s, is routed live and not replayed: its KL to the "
                    "policy holds the gap between two routings too",
                    config.trainer.algorithm.kl_coef,
                    policy.model.path,
                )
        return sharded, head

    def logprobs(self, rows: Rows, *, replayed: bool) -> Tensor:
        """Float32 `[R, N]` log-probabilities in nats of `rows.labels`, at the sampling temperature, over what they were
        sampled from.

        0 where there is no label. `replayed` says whether routing is replayed or live.
        """
        return self._score(self.model, self._head, rows, {"routed_experts": rows.routing} if replayed else {})

    @torch.no_grad()
    def reference_logprobs(self, rows: Rows) -> Tensor | None:
        """As `logprobs`, of the reference with its own routing, without gradient; None if there is no reference."""
        return None if self._reference is None else self._score(*self._reference, rows, {})

    def _score(self, model: nn.Module, head: FusedHead, rows: Rows, routing: dict[str, Any]) -> Tensor:
        padding: dict[str, Any] = {} if self.sliced else {"attention_mask": rows.tokens.long()}
        return head.logprobs(
            model,
            rows.labels,
            temperature=self.temperature,
            sampling_mask=rows.sampling_mask,
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            use_cache=False,
            **padding,
            **routing,
        )

    def rows(self, whole: StepBatch, size: int) -> Iterator[Rows]:
        """This rank's part of `whole` on its device, `size` rollouts or `micro_batch_tokens` tokens at a time."""
        rows = whole.rows(self.mesh, size=size, tokens=self.micro_batch_tokens, packed=self.packed)
        return prefetch(rows, self.device)

    def named_weights(self) -> list[tuple[str, LazyWeight]]:
        """All weights by the names of a checkpoint; sharded ones are gathered when they are sent."""
        return named_weights(self.model, fused_experts=self.fused_experts)
