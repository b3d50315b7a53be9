"""Rollouts whose fault is known: tokens sampled from a model, scored and routed by a twin of it in place of an engine.

The twin computes in float32 where `r3 explain` computes in bfloat16, and its routers see a little noise: what an engine
with kernels of its own does to routing.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from places import DEMO_MODEL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import r3
from r3.capture import Rollout, Rollouts
from r3.replay import find_routers
from r3.routing import RolloutRouting, RoutingSpec

Sequences = list[tuple[list[int], list[int]]]


def demo_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype).eval()


def demo_prompts(count: int, seed: int) -> list[list[int]]:
    from grpo_demo import CHAIN_SUM, ReasoningGymTask

    task, tokenizer = ReasoningGymTask("chain_sum", seed, CHAIN_SUM), AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [tokenizer(task.prompt(problem)).input_ids for problem in task.problems(0, count)]


@torch.no_grad()
def sample(model, prompts: Sequence[list[int]], *, seed: int, length: int = 64, **sampling) -> Sequences:
    """One completion of each prompt, cut behind the end token 1."""
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = dict(temperature=1.0, top_p=1.0, top_k=0) | sampling
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        max_new_tokens=length,
        pad_token_id=0,
        eos_token_id=1,
        **settings,
    )
    sequences = []
    for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True):
        sequences.append((prompt, row[: row.index(1) + 1] if 1 in row else row))
    return sequences


def with_router_noise(model, scale: float, seed: int = 0) -> nn.Module:
    """A copy whose routers see their input with noise, relative to its size: the same for the same input."""
    noisy = copy.deepcopy(model)

    def disturb(module, args):
        of_input = int(args[0].double().abs().sum() * 1e3) % (1 << 31)
        generator = torch.Generator().manual_seed(seed + of_input)
        noise = torch.randn(args[0].shape, generator=generator).to(args[0].dtype)
        return (args[0] + scale * args[0].std(-1, keepdim=True) * noise, *args[1:])

    for site in find_routers(noisy).sites:
        site.router.register_forward_pre_hook(disturb)
    return noisy


def trained(model, sequences: Sequences, *, steps: int, lr: float, seed: int = 0) -> nn.Module:
    """A copy after optimizer steps that push samples up and down at random, as policy gradients do."""
    other = copy.deepcopy(model).float().train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        part = [sequences[(step * 16 + i) % len(sequences)] for i in range(16)]
        advantages = torch.randn(len(part), generator=generator)
        loss = 0.0
        for (prompt, sampled), advantage in zip(part, advantages, strict=True):
            ids = torch.tensor([prompt + sampled])
            logits = other(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            loss = loss - advantage * logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).mean()
        (loss / len(part)).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return other.eval()


def processed(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Log-probabilities `[n, V]` as an engine reports them, by the warpers of transformers."""
    scores = logits / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.log_softmax(-1)


@torch.no_grad()
def rollouts_of(
    engine, sequences: Sequences, *, version: int | None = None, routed: bool = True, **reported
) -> Rollouts:
    """What `engine` would have returned: log-probabilities under `reported`, and the experts it chose."""
    items = []
    spec: RoutingSpec | None = None
    with r3.record(engine) as recorder:
        for number, (prompt, sampled) in enumerate(sequences):
            ids = torch.tensor([prompt + sampled])
            logits = engine(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            found = processed(logits, **reported).gather(1, ids[0, len(prompt) :, None])[:, 0]
            rows = recorder.routing
            spec = RoutingSpec(
                layer_ids=rows.layer_ids,
                num_layers=len(rows.layer_ids),
                num_experts=rows.num_experts,
                top_k=rows.shape[3],
            )
            valid = rows.valid.clone()
            valid[:, -1] = False
            items.append(
                Rollout(
                    prompt_ids=prompt,
                    token_ids=sampled,
                    response_mask=torch.ones(len(sampled), dtype=torch.bool),
                    logprobs=found,
                    routing=RolloutRouting(rows.expert_ids, valid, rows.layer_ids, rows.num_experts)
                    if routed
                    else None,
                    finish_reason="stop" if sampled[-1] == 1 else "length",
                    prompt_index=number,
                    weight_versions=() if version is None else (version,),
                    row_versions=None if version is None else torch.full((ids.shape[1],), version, dtype=torch.int32),
                )
            )
    return Rollouts(items, spec if routed else None)


def with_rows_moved(rollouts: Rollouts, places: int) -> Rollouts:
    """Row t stands at t + places."""
    items = []
    for item in rollouts:
        rows = item.routing
        ids, valid = rows.expert_ids.roll(places, 1), rows.valid.roll(places, 1)
        valid[:, slice(0, places) if places > 0 else slice(places, None)] = False
        items.append(replace(item, routing=RolloutRouting(ids, valid, rows.layer_ids, rows.num_experts)))
    return replace(rollouts, items=items)


def with_rows_of_others(rollouts: Rollouts) -> Rollouts:
    """Each rollout has the rows of the next one, repeated where it is longer."""
    items = []
    for item, other in zip(rollouts.items, [*rollouts.items[1:], rollouts.items[0]], strict=True):
        rows, places = other.routing, torch.arange(len(item)) % (len(other) - 1)
        valid = item.routing.valid & rows.valid[:, places]
        ids = rows.expert_ids[:, places]
        items.append(replace(item, routing=RolloutRouting(ids, valid, rows.layer_ids, rows.num_experts)))
    return replace(rollouts, items=items)


def with_logprobs_moved(rollouts: Rollouts, places: int) -> Rollouts:
    """The log-probability of token i stands beside token i + places."""
    return replace(rollouts, items=[replace(item, logprobs=item.logprobs.roll(places)) for item in rollouts])


class World:
    """The demo model, its engine's twin, later and other weights, and what was sampled: each made once.

    Args:
        folder: for checkpoints.
        seed: of all that is random.
        prompts: number of rollouts.
    """

    def __init__(self, folder: Path, seed: int, prompts: int) -> None:
        self.folder = folder
        self.seed = seed
        self.demo = str(DEMO_MODEL)
        self.model = demo_model()
        self.prompts = demo_prompts(prompts, seed)
        self.engine = with_router_noise(self.model, 0.02, seed)
        self._sampled: dict[tuple, Sequences] = {}

    def sampled(self, **sampling: Any) -> Sequences:
        key = tuple(sorted(sampling.items()))
        if key not in self._sampled:
            self._sampled[key] = sample(self.model, self.prompts, seed=self.seed, **sampling)
        return self._sampled[key]

    def rollouts(self, *, reported: dict[str, Any] | None = None, engine: Any = None, **sampling: Any) -> Rollouts:
        """Sampled with `sampling`, reported as they were sampled or as `reported`."""
        return rollouts_of(
            engine or self.engine, self.sampled(**sampling), **(sampling if reported is None else reported)
        )

    def _saved(self, name: str, model: Callable[[], Any]) -> str:
        path = self.folder / name
        model().to(torch.bfloat16).save_pretrained(path)
        return str(path)

    @cached_property
    def later(self) -> str:
        """After 8 steps at a learning rate of 1e-4, that of the demo."""
        return self._saved("later", lambda: trained(self.model, self.sampled(), steps=8, lr=1e-4, seed=self.seed))

    @cached_property
    def much_later(self) -> str:
        """After 40 steps at ten times that."""
        return self._saved("much_later", lambda: trained(self.model, self.sampled(), steps=40, lr=1e-3, seed=self.seed))

    @cached_property
    def other(self) -> str:
        """The demo's shape with random weights."""
        return self._saved("other", self._random)

    @cached_property
    def confident(self) -> str:
        """Other random weights, which are sure of what they say: any higher temperature lowers the gap."""

        def made() -> nn.Module:
            model = self._random()
            with torch.no_grad():
                model.get_output_embeddings().weight *= 20
            return model

        return self._saved("confident", made)

    def _random(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return type(self.model)(self.model.config)
