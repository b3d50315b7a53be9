"""`RoutingReplayMixin`: routing replay for TRL's GRPO and RLOO trainers, and for what derives from them.

Between TRL's own methods: the engine's answers are kept with their routing (`_generate_single_turn`), put together for
the sequences that TRL made of them (`_generate`), numbered so that TRL's shuffling carries the numbers along
(`_generate_and_score_completions`), and given to the model's forwards (`_get_per_token_logps_and_entropies`).
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import r3
from r3.errors import ReplayError
from r3.parallel import RankBarrier
from r3.weight_sync import WeightSync, named_weights
from trainer_hooks.engines import sync_ranks
from trainer_hooks.feed import RoutingFeed
from trainer_hooks.publish import push_from_all_ranks
from trainer_hooks.sampling_sets import logprobs_asked, set_metrics
from trainer_hooks.support import require_seams, require_supported
from trainer_hooks.trl import limits
from trainer_hooks.trl.engine import EngineAnswers, capturing_engine, require_server_logprobs
from trainer_hooks.trl.head import over_sets
from trainer_hooks.trl.sequences import ReplayedRows, Sequences, Turns, row_numbers

_ROWS = "routing_rows"
_Trainer: Any = object  # one of TRL's, behind the mixin


class RoutingReplayMixin(_Trainer):
    """Put before a TRL trainer among the bases of a class.

    Args:
        moe_enable_routing_replay: on or off; by default as the configuration says, and on where it has no such setting.
        weight_sync_kwargs: further arguments of `r3.weight_sync.WeightSync`: transport, delta, chunk_bytes, timeout_s.
            By default weights are handed over in memory to an engine in this process, and go to a server by NCCL from
            GPUs, by files from CPUs. By NCCL and gloo every rank sends its part.

    All other arguments are the trainer's.

    Attributes:
        replay: the handle of replay; None if it is off.

    Raises:
        ConfigError: a TRL that has moved, or settings with which replay would be wrong.
        UnsupportedModelError: the model cannot be replayed.
    """

    def __init__(
        self,
        *args: Any,
        moe_enable_routing_replay: bool | None = None,
        weight_sync_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        config = kwargs.get("args") or next((each for each in args if isinstance(each, TrainingArguments)), None)
        if moe_enable_routing_replay is None:
            moe_enable_routing_replay = getattr(config, "moe_enable_routing_replay", True)
        self.replay: r3.Replay | None = None
        self._turns: Turns | None = None
        self._made: Sequences | None = None
        self._placed: ReplayedRows | None = None
        self._loss_rows: ReplayedRows | None = None
        self._generation_step = 0
        if not moe_enable_routing_replay:
            super().__init__(*args, **kwargs)
            return
        require_seams("trl", limits.TESTED, limits.seams(type(self)))
        if config is None:
            raise r3.ConfigError("args: expected a configuration with use_vllm=True, got none: vLLM captures routing")
        require_supported("TRL", limits.BEFORE_START, limits.subject(config, kwargs))
        self._logprobs = logprobs_asked(limits.sampling(config))
        with capturing_engine(self._logprobs):
            super().__init__(*args, **kwargs)
        require_supported("TRL", limits.AFTER_START, limits.subject(config, kwargs, self.accelerator.state))
        # Before accelerate wraps the model, which has not happened yet.
        self.replay = r3.attach(self.model)
        self._feed = RoutingFeed(self.replay)
        self._start_sync(self.replay, weight_sync_kwargs or {})

    # --- engine

    def _start_sync(self, replay: r3.Replay, settings: dict[str, Any]) -> None:
        generation = self.vllm_generation
        self._barrier = RankBarrier() if self.accelerator.num_processes > 1 else None
        self._sync = self._sync_ranks = None
        chosen: dict[str, Any] = {}
        if generation.mode == "colocate":
            chosen["dtype"] = generation.llm.llm_engine.vllm_config.model_config.dtype
            self._sync = WeightSync(generation.llm, **(chosen | settings))
        else:
            chosen["transport"] = "nccl" if self.accelerator.device.type == "cuda" else "files"
            self._sync_ranks = sync_ranks((chosen | settings)["transport"])
            if self.accelerator.is_main_process:
                client = generation.vllm_client
                served = client.get_server_info()["model_config"]
                require_server_logprobs(served["max_logprobs"], self._logprobs)
                chosen["dtype"] = getattr(torch, served["dtype"].removeprefix("torch."))
                self._sync = WeightSync(client.base_url, **(chosen | settings))
        self._version = 0 if self._sync is None else self._sync.version or 0
        self._engine = EngineAnswers(generation, replay.spec, self._barrier, sampling_mask=self._logprobs > 0)
        generation.sync_weights = self._sync_weights
        generation.logprobs = self._logprobs or generation.logprobs or 0  # capture checks them

    def _sync_weights(self) -> None:
        """In place of `VLLMGeneration.sync_weights`, which loads parameter by parameter outside any reload."""
        generation = self.vllm_generation
        if generation.mode == "colocate" and generation.enable_sleep_mode:
            torch.cuda.empty_cache()
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        self._version += 1
        weights = named_weights(self.accelerator.unwrap_model(self.model))
        receipt = push_from_all_ranks(self._sync, weights, self._version, self._barrier, ranks=self._sync_ranks)
        if receipt is not None:
            self._metrics["train"]["sync/seconds"].append(receipt.seconds)

    # --- generation

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.replay is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._engine.forget()
        result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self._turns is not None:
            self._turns.add(self._engine.take(len(prompt_ids), self._version))
        self._engine.forget()
        return result

    def _generate(self, prompts: list) -> Any:
        result = super()._generate(prompts)
        if self.replay is not None and self._turns is not None:
            self._made = self._turns.joined(result[0], result[1])
        return result

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.replay is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._turns, self._made, self._placed = Turns(), None, None
        try:
            batch = super()._generate_and_score_completions(inputs)
            prompts, completions = batch["prompt_ids"], batch["completion_ids"]
            placed = self._of_generation(torch.cat([prompts, completions], dim=1), completions.shape[1])
            assert self._made is not None
            self._metrics["train"]["routing/replayed_frac"].append(self._made.replayed_share)
            if self._logprobs:
                for name, value in set_metrics(self._made.set_sizes).items():
                    self._metrics["train"][name].append(value)
        finally:
            self._turns = self._made = None
        self._generation_step += 1
        self._placed = placed
        batch[_ROWS] = row_numbers(self._generation_step, len(prompts))
        return batch

    def _of_generation(self, input_ids: Tensor, completion_columns: int) -> ReplayedRows:
        """Of the rows `[B, S]` that TRL made of the current generation."""
        if self._placed is None:
            if self._made is None:
                raise ReplayError("TRL scores completions before it has generated them: r3's hook knows no such order")
            self._placed = self._made.placed(input_ids, input_ids.shape[1] - completion_columns)
        return self._placed

    # --- forwards

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if self.replay is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        numbers = inputs.get(_ROWS)
        if numbers is None or self._placed is None or not (numbers[:, 0] == self._generation_step).all():
            raise ReplayError(
                "expected the inputs of a loss to be numbered by the last generation, they are not: something between "
                "TRL's generation and its loss makes rows of its own"
            )
        self._loss_rows = self._placed.select(numbers[:, 1].tolist())
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_rows = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        rows = self._loss_rows
        if rows is None and self._turns is not None:
            rows = self._of_generation(input_ids, logits_to_keep)
        with contextlib.ExitStack() as stack:
            if rows is not None:
                # The reference too is over the sets, for the KL to it; its routing stays its own.
                stack.enter_context(over_sets(rows.sampling_mask, input_ids, attention_mask, logits_to_keep))
                if not self._is_reference(model):
                    stack.enter_context(self._feed.rows(rows.routing))
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _is_reference(self, model: Any) -> bool:
        """Whether this forward is the reference's: a model of its own, or the policy's without its adapter."""
        if model is self.ref_model:
            return True
        policy = self.accelerator.unwrap_model(self.model)
        if not hasattr(policy, "peft_config"):
            return False
        active = policy.active_adapter
        return bool(policy._adapters_disabled) or active == "ref" or active == ["ref"]
