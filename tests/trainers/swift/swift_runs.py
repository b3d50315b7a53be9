"""Runs of ms-swift's own pipeline (`swift rlhf --rlhf_type grpo`) that tests look at.

The engine is a real one, or a stand-in that samples tokens at random and says that they went to experts of their own:
a row that is put beside another token is another. All else is swift: arguments, template, dataset, sampler, collating,
trainer.
"""

import copy
import json
import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import DEMO_MODEL
from ports import free_port
from swift.arguments import RLHFArguments
from swift.infer_engine.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    RolloutOutput,
    UsageInfo,
)
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.rlhf_trainers import rollout_mixin
from swift.trainers import TrainerFactory
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trainers.conformance import VOCABULARY, Oracle, Scored, plain_model, plain_weights, rows_of

import trainer_hooks.ms_swift.plugin  # noqa: F401
from r3.capture import SamplingMask
from r3.capture.kept_ids import KeptIds
from trainer_hooks.ms_swift import trainer as hook
from trainer_hooks.ms_swift.engine import SETS

PROMPTS = [f"{a}+{b}=\n" * (1 + a % 3) for a in range(10, 14) for b in range(10, 14)]
END = 1
METRIC = "k3_kl"


class Varied(ORM):
    """A reward that differs within a group."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]


orms["varied"] = Varied


class StandIn:
    """In place of swift's `GRPOVllmEngine`: no model. Answers as swift's engine does, with rows of P + G - 1 tokens."""

    def __init__(self, template: Any, seed: int = 0) -> None:
        self.template = copy.copy(template)
        self.template.padding_free = False
        self.random = random.Random(seed)
        quiet = lambda: None
        self.engine = SimpleNamespace(reset_mm_cache=quiet, reset_prefix_cache=quiet, reset_encoder_cache=quiet)

    def infer(self, requests: list[Any], config: Any, use_tqdm: bool = False) -> list[RolloutOutput]:
        self.template.set_mode("transformers")
        return [self._answer(request, config) for request in requests]

    def _answer(self, request: Any, config: Any) -> RolloutOutput:
        prompt = list(self.template.encode(request)["input_ids"])
        length = self.random.randint(2, config.max_tokens)
        tokens = [self.random.randrange(2, VOCABULARY) for _ in range(length)]
        if length < config.max_tokens:
            tokens[-1] = END
        ids = prompt + tokens
        choice = ChatCompletionResponseChoice(
            index=0,
            message=ChatMessage(role="assistant", content=self.template.tokenizer.decode(tokens)),
            finish_reason="stop" if tokens[-1] == END else "length",
            logprobs={"content": [{"token": "", "logprob": -1.0} for _ in tokens]},
            token_ids=tokens,
            routed_experts=rows_of(ids[:-1]).numpy(),
        )
        if config.top_logprobs:
            sets = [
                {token, *(self.random.randrange(2, VOCABULARY) for _ in range(self.random.randint(0, 6)))}
                for token in tokens
            ]
            setattr(choice, SETS, KeptIds([len(each) for each in sets], [token for each in sets for token in each]))
        usage = UsageInfo(len(prompt), len(tokens), len(ids))
        response = ChatCompletionResponse("stand-in", [choice], usage, prompt_token_ids=prompt)
        return RolloutOutput(response=response)


@dataclass
class Known:
    """What the engine answered for a sequence."""

    prompt: int
    rows: Tensor
    logprobs: Tensor
    sets: SamplingMask | None


class Watched:
    """Put before a GRPO trainer: scores of the policy beside those of a plain model.

    Attributes:
        known: the engine's answers, by their tokens.
        scored: of each call that scores with the policy or the reference.
    """

    spoil: Any = None

    def _prepare_vllm_engine(self) -> Any:
        self.scored: list[Scored] = []
        self.known: dict[tuple[int, ...], Known] = {}
        made = self._engine()
        infer = made.infer
        made.infer = lambda *args, **kwargs: [self._keep(output) for output in infer(*args, **kwargs)]
        return made

    def _engine(self) -> Any:
        return StandIn(self.template)

    def _keep(self, output: RolloutOutput) -> RolloutOutput:
        response = output.response
        choice = response.choices[0]
        prompt, sets = len(response.prompt_token_ids), getattr(choice, SETS, None)
        self.known[(*response.prompt_token_ids, *choice.token_ids)] = Known(
            prompt,
            torch.tensor(choice.routed_experts),
            torch.tensor([each["logprob"] for each in choice.logprobs["content"]]),
            sets and SamplingMask.of(*sets, choice.token_ids, first=prompt),
        )
        if self.spoil is not None:
            self.spoil(response)
        return output

    def _move_full_model_to_vllm(self) -> None:
        """The stand-in has no weights."""

    def _get_per_token_logps_and_entropies(self, model: Any, model_inputs: Any, grpo_batch: Any, *a: Any, **k: Any):
        inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in model_inputs.items()}
        result = super()._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, *a, **k)
        if getattr(self, "replay", None) is not None:
            self.scored.append(
                self._compared(model, inputs, grpo_batch.completion_mask.cpu(), result[0].detach().cpu())
            )
        return result

    def _compared(self, model: Any, inputs: dict[str, Any], mask: Tensor, logps: Tensor) -> Scored:
        policy = self.accelerator.unwrap_model(self.model)
        oracle = _oracle()
        oracle.model.load_state_dict(plain_weights(self.accelerator.unwrap_model(model)))
        oracle.rows = {ids: known.rows for ids, known in self.known.items()}
        oracle.sets = {ids: known.sets for ids, known in self.known.items() if known.sets and self.model.training}
        forward = [(ids, row[here]) for ids, row, here in zip(sequences(inputs), logps, mask, strict=True)]
        return oracle.scored(
            forward,
            {ids: known.logprobs for ids, known in self.known.items()},
            self.temperature,
            in_loss=torch.is_grad_enabled(),
            training=self.model.training,
            reference=model is self.ref_model or bool(getattr(policy, "_adapters_disabled", False)),
        )


def sequences(inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    """The samples of a micro-batch, padded on either side or one after another."""
    ids = inputs["input_ids"]
    if inputs.get("attention_mask") is not None:
        return [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids, inputs["attention_mask"], strict=True)]
    positions = inputs["position_ids"].flatten()
    starts = (positions == 0).nonzero().flatten().tolist()
    return [tuple(part.tolist()) for part in ids[0].tensor_split(starts[1:])]


@cache
def _oracle() -> Oracle:
    return Oracle(plain_model(), {})


class WatchedGRPO(Watched, hook.GRPOTrainer):
    """r3's, with the stand-in."""


class RealGRPO(Watched, hook.GRPOTrainer):
    """r3's, with the engine that swift starts, in bfloat16."""

    def _engine(self) -> Any:
        self.model.model_info.torch_dtype = torch.bfloat16
        return hook.GRPOTrainer._prepare_vllm_engine(self)

    def _move_full_model_to_vllm(self) -> None:
        # As the engine has them: else float32 weights alone are a gap.
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
        hook.GRPOTrainer._move_full_model_to_vllm(self)


class PlainGRPO(Watched, hook.grpo_trainer.GRPOTrainer):
    """swift's own, with the stand-in."""


class Pipeline(SwiftRLHF):
    """swift's, which keeps its trainer."""

    def train(self, trainer: Any) -> Any:
        self.trainer = trainer
        return super().train(trainer)


def settings_of(folder: Path, **settings: Any) -> RLHFArguments:
    """swift's arguments for the demo's model on PROMPTS."""
    data = folder / "prompts.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) for prompt in PROMPTS]
    data.write_text("\n".join(lines) + "\n")
    packed = settings.pop("padding_free", False)
    defaults = {
        "rlhf_type": "grpo",
        "model": str(DEMO_MODEL),
        "model_type": "qwen3_moe",
        "template": "default",
        "use_chat_template": False,
        "tuner_type": "full",
        "dataset": [str(data)],
        "load_from_cache_file": False,
        "split_dataset_ratio": 0,
        "reward_funcs": ["varied"],
        "use_vllm": True,
        "vllm_mode": "colocate",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "beta": 0.0,
        "temperature": 1.0,
        "attn_impl": "eager",
        "torch_dtype": "float32",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "check_model": False,
        "seed": 3,
    }
    made = RLHFArguments(**{**defaults, **settings})
    if packed:
        # swift admits it with FlashAttention alone. transformers' eager attention knows packed rows by their positions.
        made.padding_free = made.training_args.padding_free = True
    return made


# swift makes a process group also of one process: without this, on a port that all tests of a machine share.
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def run(folder: Path, *, trainer: str = "WatchedGRPO", spoil: Any = None, **settings: Any) -> Any:
    """Train by swift's pipeline; returns the trainer.

    Args:
        folder: for its files.
        trainer: one of this module.
        spoil: changes the engine's responses.
        settings: of swift, beside those of `settings_of`.
    """
    pipeline = Pipeline(settings_of(folder, **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", f"{__name__}.{trainer}")
        patch.setattr(Watched, "spoil", staticmethod(spoil) if spoil else None)
        if trainer != "RealGRPO":
            patch.setattr(rollout_mixin, "is_vllm_available", lambda: True)
            patch.setattr(rollout_mixin, "check_vllm_version_ge", lambda version: True)
        pipeline.main()
    return pipeline.trainer


def run_with_engine(folder: Path, **settings: Any) -> Any:
    """`run` with the vLLM engine that swift starts in this process: 2 generations of 2 iterations.

    Returns the trainer, and what swift's own measure `METRIC` of the mismatch is in its log, and would be live.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        patch.setenv("VLLM_PLUGINS", "")  # those of swift want torchvision
        made = run(
            folder,
            trainer="RealGRPO",
            vllm_engine_kwargs={"kv_cache_memory_bytes": 100_000_000},
            vllm_max_model_len=128,
            use_cpu=False,
            num_iterations=2,
            max_steps=4,
            learning_rate=1e-3,
            log_rollout_offpolicy_metrics=True,
            **settings,
        )
    own = [line[f"rollout_correction/{METRIC}"] for line in made.state.log_history if "loss" in line]
    live = [_mismatch(made, each) for each in made.scored if each.training and not each.in_loss]
    return made, sum(own) / len(own), sum(live) / len(live)


def _mismatch(made: Any, forward: Scored) -> float:
    """swift's own measure, of live forwards."""
    _, live, engine = (pad_sequence(list(part), batch_first=True) for part in zip(*forward.sampled, strict=True))
    mask = pad_sequence([torch.ones(len(part)) for _, part, _ in forward.sampled], batch_first=True)
    return made._compute_rollout_offpolicy_metrics(live, engine, mask)[METRIC].item()
