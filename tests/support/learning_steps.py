"""A tiny policy that learns, and what it should do: the objective written out by rollout, in float64 and without r3."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import Choices
from places import DEMO_MODEL
from torch import Tensor
from zoo import CASES

import r3
from r3.capture import RolloutBatch
from trainer_hooks.batches import StepBatch
from trainer_hooks.grpo import GRPOTrainer
from trainer_hooks.launch import process_group
from trainer_hooks.policy import Policy

CASE = CASES["qwen3_moe"]
LENGTHS, WIDTH, PROMPT = (12, 9, 11, 7), 12, 4
TEMPERATURE, LOW, HIGH = 0.7, 0.1, 0.4
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.05
ADVANTAGES = torch.tensor([1.0, -0.5, 0.75, -1.25])
# In turn, of the sampled tokens: on both sides of both bounds, also of bounds that were swapped.
RATIOS = torch.tensor([0.5, 0.8, 0.95, 1.05, 1.25, 2.0])

Tensors = dict[str, Tensor]


def save_checkpoint(path: Path) -> Path:
    """A two-expert-layer Qwen3-MoE, with a tokenizer that knows all of its tokens."""
    CASE.build().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path)
    return path


def settings(path: Path, **changes: Any) -> r3.R3Config:
    """`changes` by dotted key. Gradients are not clipped unless they say so."""
    pairs = {
        "trainer.policy.model.path": str(path),
        "trainer.policy.fsdp_config.param_dtype": "float32",
        "trainer.policy.optimizer_config.lr": LR,
        "trainer.policy.optimizer_config.weight_decay": WEIGHT_DECAY,
        "trainer.policy.optimizer_config.max_grad_norm": 1e6,
        "trainer.algorithm.eps_clip_low": LOW,
        "trainer.algorithm.eps_clip_high": HIGH,
        "generator.sampling_params.temperature": TEMPERATURE,
    }
    return r3.R3Config.from_overrides([f"{key}={value}" for key, value in (pairs | changes).items()])


def make_rollouts(path: Path) -> RolloutBatch:
    """Four rollouts of four lengths with random routing that lacks rows, and single layers of rows.

    The model's log-probabilities are off theirs by `RATIOS`.
    """
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 64, (len(LENGTHS), WIDTH), generator=generator)
    real = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    response = real & (torch.arange(WIDTH) >= PROMPT)
    layers = len(CASE.router_layers)
    shape = (*ids.shape, layers, CASE.num_experts)
    experts = torch.rand(shape, generator=generator).argsort(-1)[..., : CASE.top_k]
    valid = real[..., None].repeat(1, 1, layers)
    valid[:, 6] = False
    valid[:, 2::4, 1] = False
    batch = RolloutBatch(
        input_ids=ids,
        attention_mask=real.long(),
        response_mask=response,
        logprobs=torch.zeros(ids.shape),
        routing=r3.RolloutRouting(experts, valid, CASE.router_layers, CASE.num_experts),
    )
    with torch.no_grad():
        found = [sampled_logprobs(plain_model(path), batch, b) for b in range(len(ids))]
    ratios = RATIOS[torch.arange(int(response.sum())) % len(RATIOS)]
    batch.logprobs[response] = (torch.cat(found) - ratios.log()).float()
    return batch


def plain_model(path: Path, state: Tensors | None = None) -> Any:
    """The checkpoint, or the same model with the weights `state`, in float64; r3 has no part in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    model.set_experts_implementation("eager")
    if state is not None:
        model.load_state_dict(state)
    return model


def sampled_logprobs(model: Any, batch: RolloutBatch, b: int, *, replayed: bool = True) -> Tensor:
    """Of rollout b alone, without padding: float64 `[sampled tokens]`, in nats at the sampling temperature."""
    n = int(batch.attention_mask[b].sum())
    ids = batch.input_ids[b : b + 1, :n]
    chosen = batch.routing.expert_ids[b, :n].long()
    chosen = chosen.masked_fill(~(batch.routing.validity[b, :n, :, None] & replayed), -1)
    with Choices(CASE, chosen):
        logits = model(input_ids=ids, use_cache=False).logits
    found = (logits / TEMPERATURE).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return found[batch.response_mask[b, 1:n]]


@dataclass(frozen=True)
class Truth:
    """Of one update: its loss, the share of its tokens outside the bounds, and gradients before clipping."""

    loss: float
    clipped: float
    gradients: Tensors

    @property
    def norm(self) -> float:
        return float(sum(gradient.square().sum() for gradient in self.gradients.values()) ** 0.5)


def formula(
    path: Path, state: Tensors, batch: RolloutBatch, advantages: Tensor, rollouts: Sequence[int], replayed: bool = True
) -> Truth:
    """Of these `rollouts`, under the weights `state`.

    The loss is the mean over all sampled tokens of -A min(r, 1 + high) where A is positive, and of -A max(r, 1 - low)
    where it is negative: PPO's clipped surrogate by cases (Schulman et al. 2017, arXiv 1707.06347, figure 1).
    """
    model = plain_model(path, state)
    parts, outside = [], 0
    for b in rollouts:
        ratio = (sampled_logprobs(model, batch, b, replayed=replayed) - batch.logprobs[b][batch.response_mask[b]]).exp()
        a = float(advantages[b])
        parts.append(-a * (ratio.clamp(max=1 + HIGH) if a > 0 else ratio.clamp(min=1 - LOW)))
        outside += int((ratio < 1 - LOW).sum() + (ratio > 1 + HIGH).sum())
    loss = torch.cat(parts).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return Truth(float(loss.detach()), outside / len(torch.cat(parts)), dict(zip(names, gradients, strict=True)))


@dataclass
class Trace:
    """What a trainer did: by optimizer step, the weights before it and the gradients that it took; then the result."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: list[Tensors] = field(default_factory=list)  # one more than gradients
    gradients: list[Tensors] = field(default_factory=list)


def learn(config: r3.R3Config, batch: RolloutBatch, advantages: Tensor, *, calls: int = 1) -> Trace:
    """`calls` of the trainer's `update` on one batch. Every rank of a process group runs this."""
    trace = Trace()
    with process_group():
        policy = Policy(config)

        def before_step(*_: Any) -> None:
            trace.weights.append(full(policy.model.named_parameters()))
            trace.gradients.append(full((name, p.grad) for name, p in policy.model.named_parameters()))

        policy.optimizer.register_step_pre_hook(before_step)
        trainer = GRPOTrainer(config, None, policy, None)
        for _ in range(calls):
            trace.metrics.append(trainer.update(StepBatch.of(batch, advantages)))
        trace.weights.append(full(policy.model.named_parameters()))
    return trace


def full(named: Any) -> Tensors:
    """Copies in float64; sharded ones are gathered."""
    whole = ((name, t.full_tensor() if hasattr(t, "full_tensor") else t) for name, t in named)
    return {name: t.detach().double().cpu().clone() for name, t in whole}


def adamw(before: Tensors, gradients: Sequence[Tensors]) -> Tensors:
    """Weights after the steps of all `gradients`: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2."""
    found = {}
    for name, weight in before.items():
        w, m, v = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
        for t, step in enumerate(gradients, 1):
            m = BETAS[0] * m + (1 - BETAS[0]) * step[name]
            v = BETAS[1] * v + (1 - BETAS[1]) * step[name] ** 2
            change = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
            w = w - LR * (change + WEIGHT_DECAY * w)
        found[name] = w
    return found
