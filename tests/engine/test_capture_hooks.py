"""Capture by hooks, where vLLM refuses to capture: a busy engine returns the rows of each request alone.

The engine is small and full: prompts are prefilled in pieces beside requests that decode, blocks are shared and reused,
and requests lose their blocks and are computed again.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from places import DEMO_MODEL
from routing_flips import FIRST_ULPS, explained_flips, router_logits

import r3
from r3 import CaptureError, RolloutRouting
from r3.capture import Rollout, collect, engine_kwargs
from r3.entry_points import SCHEDULER, WORKER
from r3.vllm_compat.capture import capture_backend

pytestmark = pytest.mark.engine

REQUESTS = 24
HOOKS = {"enable_return_routed_experts": False, "worker_cls": WORKER, "scheduler_cls": SCHEDULER}
NATIVE = {"enable_return_routed_experts": True, "worker_cls": "auto", "scheduler_cls": None}
BUSY: dict[str, Any] = {
    "block_size": 32,
    "num_gpu_blocks_override": 64,  # 24 requests grow to some 150 blocks, of which they share a quarter
    "max_num_batched_tokens": 64,
    "max_num_seqs": REQUESTS,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


@dataclass(frozen=True, kw_only=True)
class Played:
    """What an engine returned.

    Attributes:
        busy: rollouts of two waves of requests, many at a time.
        alone: for each of them, a prefill of all its tokens by itself, that samples one more.
        cached: tokens of the second wave that came from the prefix cache.
        preempted: how many times a request lost its blocks.
    """

    busy: list[Rollout]
    alone: list[Rollout]
    cached: int
    preempted: int


@contextlib.contextmanager
def engine(config, **changes) -> Iterator[Any]:
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        if "pipeline_parallel_size" in changes:
            # By itself vLLM gives each worker a NUMA node of its own, and does not start where there are fewer.
            cores = sorted(os.sched_getaffinity(0))
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        llm = LLM(**engine_kwargs(config) | {"worker_extension_cls": "hooks_worker.UnhookingWorker"} | BUSY | changes)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def settings(**changes: Any) -> Any:
    """vLLM's own configuration of an engine with the demo's model."""
    from vllm import EngineArgs

    return EngineArgs(**{"model": str(DEMO_MODEL), "enforce_eager": True} | HOOKS | changes).create_engine_config()


def some_tokens(seed: int, length: int) -> list[int]:
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(llm, prompts: list[list[int]], **sampling) -> list[Any]:
    from vllm import SamplingParams

    # No seeds: with one, vLLM's CPU build ends on a prompt that is prefilled in pieces. The engine's own seed serves.
    params = [SamplingParams(logprobs=0, ignore_eos=True, n=3 if i % 6 == 0 else 1) for i in range(len(prompts))]
    for each in params:
        for name, value in sampling.items():
            setattr(each, name, value)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def ids_of(rollout: Rollout) -> list[int]:
    return [*rollout.prompt_ids, *rollout.token_ids]


def by_itself(llm, rollout: Rollout, spec) -> Rollout:
    """A prefill of all tokens of `rollout`, that samples one more."""
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [ids_of(rollout)], max_tokens=1, n=1)
    assert not output.num_cached_tokens
    return collect([output], spec).items[0]


def play(llm, spec, requests: int = REQUESTS) -> Played:
    """Two waves of requests; those of the second go on from the first, share their prompts, or are new."""
    prefixes = [some_tokens(1000 + group, 70) for group in range(4)]
    first = [prefixes[i % 4] + some_tokens(i, 3 + 5 * i) for i in range(requests)]
    outputs = generate(llm, first, max_tokens=72)
    second = [
        [
            [*first[i], *outputs[i].outputs[0].token_ids, *some_tokens(i, 9)],
            first[i],
            prefixes[i % 4] + some_tokens(500 + i, 40),
        ][i % 3]
        for i in range(requests)
    ]
    again = generate(llm, second, max_tokens=40)
    busy = collect([*outputs, *again], spec).items
    alone = [by_itself(llm, rollout, spec) for rollout in busy]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"}
    return Played(
        busy=busy,
        alone=alone,
        cached=sum(output.num_cached_tokens for output in again),
        preempted=int(counters["vllm:num_preemptions"]),
    )


@pytest.fixture(scope="module")
def trainer():
    """The trainer's model, with replay attached, and its spec."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).eval()
    return model, r3.attach(model).spec


@pytest.fixture(scope="module")
def hooked(demo_config, trainer) -> tuple[Played, str]:
    """What hooks captured, and what `collect` says after the hook of layer 5 was taken out."""
    with engine(demo_config, **HOOKS) as llm:
        played = play(llm, trainer[1])
        llm.collective_rpc("r3_test_unhook", args=(5,))
        with pytest.raises(CaptureError) as caught:
            collect(generate(llm, [some_tokens(i, 20) for i in range(4)], max_tokens=8, n=1), trainer[1])
    return played, str(caught.value)


def equal(a: Rollout, b: Rollout) -> bool:
    assert a.routing is not None
    assert b.routing is not None
    return (
        a.prompt_ids == b.prompt_ids
        and torch.equal(a.routing.expert_ids, b.routing.expert_ids)
        and torch.equal(a.routing.valid, b.routing.valid)
    )


def rows_of(whole: Rollout, length: int) -> RolloutRouting:
    """Routing of the first `length` tokens, of which the last has no row yet when it is sampled."""
    routing = whole.routing
    assert routing is not None
    valid = routing.valid[:, :length] & (torch.arange(length) < length - 1)
    return RolloutRouting(routing.expert_ids[:, :length], valid, routing.layer_ids, routing.num_experts)


def live(logits: torch.Tensor, routing: RolloutRouting) -> RolloutRouting:
    """What the trainer's routers would have chosen for the same tokens."""
    chosen = logits.topk(routing.shape[3]).indices[None].where(routing.valid[..., None, None], 0)
    return RolloutRouting(chosen, routing.valid, routing.layer_ids, routing.num_experts)


def require_rows_of_requests_alone(played: Played, model) -> str:
    """All rows are there, and differ from those of a prefill by what rounding explains; counts, in words.

    So do those of the prefill from the trainer's own choices: rows that are moved everywhere alike are seen there.
    A wrong row has first flips far from the boundary; margins of following flips say nothing about rows.
    """
    rows = flipped = pairs = trainers = 0
    margins = [0.0, 0.0]
    for busy, alone in zip(played.busy, played.alone, strict=True):
        assert busy.prompt_ids + busy.token_ids == alone.prompt_ids
        assert busy.routing is not None
        assert busy.routing.rows_valid == len(busy) - 1
        expected = rows_of(alone, len(busy))
        logits = router_logits(model, alone.prompt_ids, expected)
        report = explained_flips(busy.routing, expected, logits)
        own = explained_flips(expected, live(logits, expected), logits)
        for each in (report, own):
            assert each.unmatched_tokens == 0
            assert each.share < 0.05, str(each)
            assert each.first_margin_ulps < FIRST_ULPS, str(each)
        trainers += own.flips
        rows, flipped, pairs = rows + len(busy) - 1, flipped + report.flips, pairs + report.pairs
        margins = [max(margins[0], report.first_margin_ulps), max(margins[1], report.following_margin_ulps)]
    assert flipped / pairs < 0.02
    return (
        f"{len(played.busy)} samples, {rows} rows, {flipped} of {pairs} (token, layer) pairs flipped, margins up to "
        f"{margins[0]:.1f} and {margins[1]:.1f} ulps, {trainers} against the trainer's choices; "
        f"{played.preempted} preemptions, {played.cached} tokens cached"
    )


def test_a_busy_engine_returns_the_rows_of_each_request_alone(hooked, trainer, capsys):
    played, _ = hooked
    found = require_rows_of_requests_alone(played, trainer[0])
    with capsys.disabled():
        print(f"\n{found}")
    assert played.preempted > 0
    assert played.cached > 1000
    assert len(played.busy) == 2 * (REQUESTS + 2 * REQUESTS // 6)


def test_a_layer_whose_hook_is_not_called_is_refused_by_its_number(hooked):
    _, message = hooked
    assert "4 of 4 samples" in message
    assert "decoder layers [5] were never captured" in message


@pytest.mark.long
@pytest.mark.release
def test_vllm_itself_captures_the_same_rows_or_refuses(hooked, demo_config, trainer):
    if capture_backend(pipeline_parallel_size=1) == "hooks":
        with pytest.raises(ValueError, match="AuxOutput Connector requires Model Runner V2"):
            settings(**NATIVE)
        return
    with engine(demo_config, **NATIVE) as llm:
        native = play(llm, trainer[1])
        alone = [by_itself(llm, rollout, trainer[1]) for rollout in hooked[0].busy]
    require_rows_of_requests_alone(native, trainer[0])
    assert all(equal(ours, theirs) for ours, theirs in zip(hooked[0].alone, alone, strict=True))
    # When a busy engine preempts is a matter of time, and a token may be sampled otherwise, with what follows from it.
    pairs = list(zip(hooked[0].busy, native.busy, strict=True))
    same = [(ours, theirs) for ours, theirs in pairs if ids_of(ours) == ids_of(theirs)]
    assert len(same) > 0.7 * len(pairs)
    assert all(equal(ours, theirs) for ours, theirs in same)


@pytest.mark.long
@pytest.mark.release
def test_pipeline_stages_give_the_rows_of_all_layers(hooked, demo_config, trainer, capsys):
    """Hidden states go to the next stage as they are: a request alone has the same rows, bit for bit."""
    model, spec = trainer
    small = {"pipeline_parallel_size": 2, "num_gpu_blocks_override": 24}
    with engine(demo_config, **HOOKS, **small) as llm:
        played = play(llm, spec, requests=8)
        again = [by_itself(llm, rollout, spec) for rollout in hooked[0].busy[::8]]
    found = require_rows_of_requests_alone(played, model)
    with capsys.disabled():
        print(f"\n{found}")
    assert played.preempted > 0
    assert played.cached > 250
    assert all(equal(a, b) for a, b in zip(again, hooked[0].alone[::8], strict=True))


@pytest.fixture(scope="module")
def vllm_config():
    return settings()


def test_settings_that_hooks_can_work_with_are_admitted(vllm_config):
    from r3.capture.in_engine.routing_worker import check_settings

    check_settings(vllm_config)


@pytest.mark.parametrize(
    ("part", "name", "value", "named"),
    [
        ("parallel_config", "data_parallel_size", 2, "data_parallel_size=2"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size=2"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill_context_parallel_size=2"),
        ("parallel_config", "enable_dbo", True, "microbatches"),
        ("model_config", "enforce_eager", False, "enforce_eager=False"),
        ("model_config or aux_output_config", "enable_return_routed_experts", True, "enable_return"),
    ],
)
def test_settings_that_hooks_cannot_work_with_are_refused(vllm_config, monkeypatch, part, name, value, named):
    from r3.capture.in_engine.routing_worker import check_settings

    parts = [getattr(vllm_config, each, None) for each in part.split(" or ")]
    (holder,) = [each for each in parts if hasattr(each, name)]
    monkeypatch.setattr(holder, name, value)
    with pytest.raises(CaptureError, match=f"capture by hooks cannot work with {named}"):
        check_settings(vllm_config)
