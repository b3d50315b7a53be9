"""`GRPOTrainer`: swift's, with routing replay.

Between swift's own methods: its samples keep the engine's tokens and rows through shuffling and regrouping
(`sample_cls`), each micro-batch gets the rows where its tokens are (`_prepare_batch_inputs`), and the policy's forwards
in training bring them to the model (`_get_per_token_logps_and_entropies`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from swift.rlhf_trainers import grpo_trainer

import r3
from r3.errors import ReplayError
from r3.parallel import RankBarrier
from r3.replay.context import KEYWORD
from r3.weight_sync import WeightSync, named_weights
from trainer_hooks.feed import RoutingFeed
from trainer_hooks.ms_swift import engine, limits
from trainer_hooks.ms_swift.engine import SETS
from trainer_hooks.ms_swift.rows import RoutedSample, placed, without_rows
from trainer_hooks.publish import push_from_all_ranks
from trainer_hooks.sampling_sets import logits_over_sets, logprobs_asked, set_metrics
from trainer_hooks.support import require_seams, require_supported


class GRPOTrainer(grpo_trainer.GRPOTrainer):
    """`swift.rlhf_trainers.GRPOTrainer` with routing replay. Its arguments are swift's.

    Attributes:
        replay: the handle of replay; None if it is off (`enable_return_routed_experts` false in `vllm_engine_kwargs`).

    Raises:
        ConfigError: a swift that has moved, or settings with which replay would be wrong.
        UnsupportedModelError: the model cannot be replayed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs["args"]
        self.replay: r3.Replay | None = None
        self._live = False
        self._sync: WeightSync | None = None
        self._version = 0
        self._replays = engine.is_on(config)
        if not self._replays:
            super().__init__(*args, **kwargs)
            return
        require_seams("ms-swift", limits.TESTED, limits.seams())
        require_supported("ms-swift", limits.REFUSALS, limits.subject(config, kwargs))
        self._logprobs = logprobs_asked(engine.sampling(config))
        self.sample_cls = RoutedSample
        super().__init__(*args, **kwargs)
        # Before accelerate wraps the model, which has not happened yet.
        self.replay = r3.attach(self.model)
        # It gives nothing, and raises in a training forward that brings no rows.
        self._guard = RoutingFeed(self.replay)

    # --- engine

    def _prepare_vllm_engine(self) -> Any:
        if not self._replays:
            return super()._prepare_vllm_engine()
        engine.ask_for_capture(self.args, self._logprobs)
        made = super()._prepare_vllm_engine()
        if self._logprobs:
            engine.keep_sets(made)
        self._barrier = RankBarrier() if self.accelerator.num_processes > 1 else None
        self._sync = WeightSync(engine.as_llm(made.engine), dtype=made.engine.vllm_config.model_config.dtype)
        self._version = self._sync.version or 0
        return made

    def _get_request_config(self) -> Any:
        request = super()._get_request_config()
        if self._replays and self._logprobs:
            request.top_logprobs = self._logprobs
        return request

    def _move_full_model_to_vllm(self) -> None:
        """In place of swift's, which loads groups of parameters outside any reload."""
        if self._sync is None:
            super()._move_full_model_to_vllm()
            return
        self._version += 1
        weights = named_weights(self.accelerator.unwrap_model(self.model))
        receipt = push_from_all_ranks(self._sync, weights, self._version, self._barrier)
        if receipt is not None:
            self._metrics["train"]["sync/seconds"].append(receipt.seconds)

    # --- micro-batches

    def _prepare_batch_inputs(self, samples: list[RoutedSample]) -> list[dict[str, Any]]:
        if self.replay is None or not self.model.training:
            return super()._prepare_batch_inputs(samples)
        with self._collated_with_rows():
            return super()._prepare_batch_inputs(samples)

    @contextlib.contextmanager
    def _collated_with_rows(self) -> Iterator[None]:
        """Context in which swift's micro-batches have the rows of r3's own placing, and not of swift's."""
        collate = grpo_trainer.collate_to_grpo_micro_batch

        def collated(samples: list[RoutedSample], template: Any, **kwargs: Any) -> Any:
            model_inputs, grpo_batch = collate(samples, template, **kwargs)
            if self._live:
                return model_inputs, grpo_batch
            assert self.replay is not None
            input_ids, left = model_inputs["input_ids"], template.padding_side == "left"
            rows = placed(samples, self.replay.spec, input_ids, packed=template.padding_free, left=left)
            metrics = {"routing/replayed_frac": rows.captured}
            if self._logprobs:
                if rows.sampling_mask is None:
                    raise ReplayError("top_k, top_p or min_p is set, and swift's samples came without their sets")
                sizes = rows.sampling_mask.sizes
                metrics |= set_metrics(sizes[sizes > 0])
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)
            return {**model_inputs, KEYWORD: rows.routing.to(input_ids.device), SETS: rows.sampling_mask}, grpo_batch

        grpo_trainer.collate_to_grpo_micro_batch = collated
        try:
            yield
        finally:
            grpo_trainer.collate_to_grpo_micro_batch = collate

    # --- forwards

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        model_inputs = dict(model_inputs)
        sets = model_inputs.pop(SETS, None)
        if self.replay is not None:
            if self._live or not self.model.training or not self._is_policy(model):
                model_inputs = without_rows(model_inputs)
            elif model_inputs.get(KEYWORD) is None:
                raise ReplayError(
                    f"forward of the policy in training without `{KEYWORD}`: something between swift's rollout and its "
                    "loss makes micro-batches that r3's hook does not know"
                )
            if self.model.training and self._logprobs and sets is None:
                raise ReplayError(
                    f"forward in training without `{SETS}`, with top_k, top_p or min_p: its log-probabilities would be "
                    "over the whole vocabulary. A teacher with a prompt of its own (teacher_prompt) is such a forward"
                )
        # The reference and a teacher too are over the sets, for the KL to them.
        with logits_over_sets(model, sets):
            return super()._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, *args, **kwargs)

    def _is_policy(self, model: Any) -> bool:
        unwrap = self.accelerator.unwrap_model
        return unwrap(model) is unwrap(self.model)

    @contextlib.contextmanager
    def _live_forwards(self) -> Iterator[None]:
        self._live, before = True, self._live
        try:
            yield
        finally:
            self._live = before

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """swift's: the policy as its own reference, without its adapter."""
        with self._live_forwards(), super().null_ref_context():
            yield

    def _compute_teacher_logps(self, *args: Any, **kwargs: Any) -> Any:
        with self._live_forwards():
            return super()._compute_teacher_logps(*args, **kwargs)

    def _collate_teacher_opsd_batch(self, *args: Any, **kwargs: Any) -> Any:
        with self._live_forwards():
            return super()._collate_teacher_opsd_batch(*args, **kwargs)
