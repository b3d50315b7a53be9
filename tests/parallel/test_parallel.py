"""Padded = packed = Ulysses = FSDP2 = both, on log-probabilities, loss and every gradient, with routing replayed."""

import contextlib
import functools
import importlib.metadata
import re

import parallel_jobs as jobs
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from r3 import ParallelError, SyncError
from r3.diagnostics import LogprobSums
from r3.parallel import next_tokens, token_logprobs
from r3.parallel.small_copy import small_copy


def installed(distribution):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def one(device):
    with contextlib.closing(Ranks(1, device)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two(device):
    with contextlib.closing(Ranks(2, device)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four(device):
    with contextlib.closing(Ranks(4, device)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def on_gpu():
    """One rank on a GPU, whatever `--device` says: for tests of what the CPU does not have."""
    with contextlib.closing(Ranks(1, "cuda")) as ranks:
        yield ranks


@functools.cache
def reference(family):
    return jobs.reference(family)


def difference(found, expected):
    """Largest difference of log-probabilities, loss and gradients, each relative to the largest value."""
    worst = {"logprobs": gap(found["logprobs"], expected["logprobs"])}
    worst["loss"] = abs(found["loss"] - expected["loss"]) / abs(expected["loss"])
    assert found["grads"].keys() == expected["grads"].keys()
    for name, gradient in expected["grads"].items():
        worst[name] = gap(found["grads"][name], gradient)
    return worst


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def check(found, family, tolerance=2e-5):
    expected = reference(family)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected["grads"].values())
    wrong = {name: value for name, value in difference(found, expected).items() if not value < tolerance}
    assert not wrong


families = pytest.mark.parametrize("family", list(jobs.FAMILIES))
checkpointing = pytest.mark.parametrize("checkpointing", [False, True])

ALONE = [dict(layout="padded"), dict(layout="padded", side="left"), dict(), dict(side="left"), dict(layout="rows")]


@families
@checkpointing
@pytest.mark.parametrize("layout", ALONE, ids=str)
def test_padded_and_packed_rows_in_one_process(one, family, checkpointing, layout):
    check(one.all(call, family, dict(checkpointing=checkpointing, **layout))[0], family)


@families
@checkpointing
@pytest.mark.parametrize("how", [dict(sequence=2), dict(fsdp=True), dict(sequence=2, fsdp=True)], ids=str)
def test_two_ranks(two, family, checkpointing, how):
    check(two.all(call, family, dict(checkpointing=checkpointing, **how))[0], family)


@families
@checkpointing
@pytest.mark.parametrize("how", [dict(sequence=4), dict(sequence=2, fsdp=True)], ids=str)
def test_four_ranks(four, family, checkpointing, how):
    check(four.all(call, family, dict(checkpointing=checkpointing, **how))[0], family)


MISALIGNED = {
    "routing shifted by one row": jobs.shifted,
    "routing of swapped samples": jobs.swapped,
    "routing slice of the wrong rank": jobs.wrong_slice,
    "routing flattened sequence-first": jobs.sequence_first,
}


@pytest.mark.parametrize("mistake", list(MISALIGNED))
def test_misaligned_routing_shows_in_the_metric(two, mistake):
    expected = reference("softmax")["logprobs"]
    mask = jobs.response_mask()

    def k3(found):
        return LogprobSums.from_tensors(found["logprobs"], expected, mask).metrics()["k3"]

    assert k3(two.all(call, "softmax", dict(sequence=2))[0]) < 1e-9
    assert k3(two.all(call, "softmax", dict(sequence=2, tamper=MISALIGNED[mistake]))[0]) > 1e-4


REFUSED = {
    "position slices swapped": (jobs.wrong_positions, "Slices in another order than ranks"),
    "routing of another length on one rank": (jobs.short_routing, r"1 of 2 ranks.*rank 1: routed_experts: expected"),
    "input of another length on one rank": (jobs.short_input, r"slices of one shape.*\(1, 11\), \(1, 12\)"),
    "no routing on one rank": (jobs.no_routing, "of one kind"),
    "unchecked routing": (jobs.plain_tensor, "expected a RolloutRouting"),
    "no position ids": (jobs.no_positions, "position_ids: expected"),
    "labels": (jobs.with_labels, "takes no labels"),
    "keys and values": (jobs.with_past, "takes no past_key_values"),
    "keys and values as transformers 5.24 calls them": (jobs.with_cache, "takes no cache"),
}


@pytest.mark.parametrize("mistake", list(REFUSED))
def test_what_cannot_go_together_is_an_error_on_every_rank(two, mistake):
    tamper, message = REFUSED[mistake]
    for result in two.run(call, "softmax", dict(sequence=2, tamper=tamper), timeout_s=60):
        assert isinstance(result, ParallelError), result
        assert re.search(message, str(result), re.DOTALL)
    # Nobody waits for anybody: the same ranks go on.
    two.all(call, "softmax", dict(sequence=2))


def test_a_rank_that_raises_alone_takes_the_others_with_it(two):
    other, failed = two.run(jobs.fails_on_one_rank)
    assert isinstance(failed, KeyError)
    assert isinstance(other, ParallelError)
    assert "1 of 2 ranks cannot go on" in str(other)
    assert "rank 1: KeyError: 'no such sample'" in str(other)


def test_a_rank_that_never_comes_is_an_error_after_the_timeout():
    ranks = Ranks(2)
    try:
        first, second = ranks.run(jobs.stays_away, timeout_s=60)
    finally:
        ranks.close()
    assert isinstance(first, ParallelError)
    assert "within 2 s" in str(first)
    assert second == "elsewhere"


@pytest.mark.long
@pytest.mark.parametrize("layers", [True, False], ids=["layers", "model"])
def test_compiled(two, layers):
    options = dict(sequence=2, compiled="layers" if layers else "model")
    check(two.all(call, "softmax", options, timeout_s=400)[0], "softmax", 1e-4)


def test_reentrant_checkpointing(two):
    check(two.all(call, "softmax", dict(sequence=2, checkpointing="reentrant"))[0], "softmax")


@pytest.mark.parametrize("family", ["softmax", "sigmoid, bias, groups"])
@pytest.mark.parametrize("how", [dict(), dict(layout="padded", side="left"), dict(checkpointing=True)], ids=str)
def test_sdpa_does_what_eager_does(two, family, how):
    check(two.all(call, family, dict(sequence=2, attention="sdpa", **how))[0], family)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["softmax", "gpt-oss"])
def test_flex_does_what_eager_does(on_gpu, family):
    """On the CPU torch has no backward of flex attention, and transformers no sinks."""
    check(on_gpu.all(call, family, dict(attention="flex_attention"), timeout_s=300)[0], family, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(
    not installed("flash-attn-4"),
    reason="needs FlashAttention 4, the package flash-attn-4; docs/reference/parallel.md says how to install it",
)
@pytest.mark.parametrize("layout", [dict(), dict(layout="rows"), dict(layout="padded", side="left")], ids=str)
def test_flash_attention_errs_no_more_than_masked_sdpa(on_gpu, layout):
    low = dict(fsdp=True, dtype=torch.bfloat16, **layout)
    masked = error_norm(on_gpu.all(call, "softmax", low | {"attention": "sdpa"})[0], "softmax")
    flash = on_gpu.all(call, "softmax", low | {"attention": "flash_attention_4"}, timeout_s=400)[0]
    assert 0 < error_norm(flash, "softmax") < 1.5 * masked + 1e-3
    print(f"masked sdpa {masked:.3e}, flash {error_norm(flash, 'softmax'):.3e}")


def error_norm(found, family):
    """Norm of the error of all gradients, relative to that of the gradients."""
    expected = reference(family)["grads"]
    wrong = sum(float((found["grads"][name] - gradient).square().sum()) for name, gradient in expected.items())
    return (wrong / sum(float(gradient.square().sum()) for gradient in expected.values())) ** 0.5


@families
def test_bfloat16_errs_no_more_on_two_ranks_than_on_one(one, two, family):
    """Forward and backward in bfloat16; logits and the reduction of gradients in float32."""
    low = dict(fsdp=True, dtype=torch.bfloat16)
    alone = error_norm(one.all(call, family, low)[0], family)
    for how in (dict(sequence=2), dict()):
        assert 0 < error_norm(two.all(call, family, low | how)[0], family) < 1.5 * alone + 1e-3


def test_labels_stop_at_the_end_of_their_sequence():
    ids, positions = torch.tensor([[5, 6, 7, 8, 0, 0]]), torch.tensor([[0, 1, 2, 0, 0, 0]])
    assert next_tokens(ids, positions).tolist() == [[6, 7, -100, -100, -100, -100]]


def test_token_156_of_a_small_vocabulary_is_no_missing_label():
    ids, positions = torch.tensor([[5, 156, 7]], dtype=torch.uint8), torch.tensor([[0, 1, 2]])
    assert next_tokens(ids, positions).tolist() == [[156, 7, -100]]
    with pytest.raises(ParallelError, match=r"labels: expected torch\.int64, got torch\.uint8"):
        token_logprobs(torch.zeros(1, 3, 200), ids)


# Attention of every kind: grouped heads, latent, sinks, soft caps, sliding windows, chunks, gates, no positions.
EXACT = [
    "afmoe",
    "dbrx",
    "gemma4",
    "glm4_moe_lite",
    "granitemoe",
    "llama4_text",
    "minimax_m2",
    "olmoe",
    "mimo_v2_flash",
]
ELSEWHERE = {
    "qwen3_next": "position 3 depends on",
    "nemotron_h": "position 3 depends on",
    "zaya": "position 3 depends on",
    "deepseek_v32": "leaves the attention mask to its attention function",
    "unlimited_ocr": "combines its causal mask with one of its own",
}


@pytest.mark.parametrize("name", EXACT)
def test_attention_of_many_families_is_exact_on_slices(two, name):
    for found in two.all(jobs.alone_and_sliced, name):
        assert isinstance(found, dict), found
        assert max(found.values()) < 1e-4


@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_models_whose_positions_meet_elsewhere_are_refused(two, name):
    for found in two.all(jobs.alone_and_sliced, name):
        assert isinstance(found, str), found
        assert ELSEWHERE[name] in found


@pytest.mark.parametrize(
    "how",
    [
        dict(where=[0, 1], fsdp=False),
        dict(where=[0, 1], fsdp=True),
        dict(where=[1], fsdp=True),
        dict(where=[1], fsdp=True, attached_last=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["softmax", "dense first"])
def test_a_model_may_be_on_meta_on_all_ranks_or_on_some(two, family, how):
    """As trainers build it that load a checkpoint on one rank alone: no rank computes with weights of others."""
    for found in two.all(call_on_meta, family, how, timeout_s=60):
        assert found["logits"] < 2e-5
        assert found["gradients"] < 2e-5


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_replay_attached_before_fsdp1_wraps_is_exact(two, use_orig_params):
    """Under gradient checkpointing. With flat parameters FSDP1 shows no gradients by name: their norm is compared."""
    for found in two.all(jobs.under_fsdp1, use_orig_params):
        plain, wrapped = found["plain"], found["fsdp1"]
        assert torch.equal(wrapped["logits"], plain["logits"])
        assert wrapped["loss"] == plain["loss"]
        assert wrapped["norm"] == pytest.approx(plain["norm"], rel=1e-5)
        assert wrapped["grads"].keys() == (plain["grads"].keys() if use_orig_params else set())
        for name, gradient in wrapped["grads"].items():
            assert gap(gradient, plain["grads"][name]) < 1e-6


def test_ulysses_attached_before_fsdp1_wraps_is_exact(two):
    check(two.all(call, "softmax", dict(sequence=2, fsdp="fsdp1", checkpointing=True))[0], "softmax")


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_after_fsdp1_has_wrapped_a_model_the_error_says_to_attach_before(two, use_orig_params):
    for said in two.all(jobs.too_late, use_orig_params):
        for place in ("around", "inside"):
            assert "UnsupportedModelError" in said[f"attach, {place}"]
            assert "attach before FullyShardedDataParallel wraps" in said[f"attach, {place}"]
            assert "ParallelError" in said[f"ulysses, {place}"]
            assert "before FullyShardedDataParallel wraps" in said[f"ulysses, {place}"]
            assert "the trainer's own generator of (checkpoint name, full tensor)" in said[f"named_weights, {place}"]


def test_a_copy_of_a_large_model_is_small():
    config = Qwen3MoeConfig(num_hidden_layers=40, num_experts=128, moe_intermediate_size=768, vocab_size=150_000)
    config.mlp_only_layers = [0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    copied = small_copy(model)
    assert len(copied.model.layers) == 2
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in copied.parameters()}
    assert sum(held.values()) < 1 << 28 < sum(p.nbytes for p in model.parameters()) / 100
    assert all(p.shape == model.get_parameter(name).shape for name, p in copied.named_parameters())
    assert len(model.model.layers) == model.config.num_hidden_layers == 40
    again = small_copy(model)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in copied.named_parameters())


def test_heads_that_cannot_be_split_are_refused():
    with contextlib.closing(Ranks(3)) as three:
        for found in three.run(call, "softmax", dict(sequence=3)):
            assert isinstance(found, ParallelError)
            assert "8 query heads over 2 key-value heads cannot be split over 3 ranks" in str(found)


def test_a_sync_that_fails_on_the_first_rank_leaves_nobody_waiting(two):
    first, second = two.run(jobs.push_fails_midway, timeout_s=60)
    assert isinstance(first, SyncError)
    assert "worker lost" in str(first)
    assert isinstance(second, SyncError)
    assert "rank 0: SyncError: worker lost" in str(second)


def test_a_rank_that_cannot_gather_fails_the_sync_on_every_rank(two):
    first, second = two.run(jobs.gather_fails_on_one_rank, timeout_s=60)
    assert isinstance(first, SyncError)
    assert "rank 1: SyncError: 1 weights could not be gathered" in str(first)
    assert isinstance(second, SyncError)
    assert "MemoryError: no memory for" in str(second)


def call_on_meta(family, how):
    return jobs.on_meta(family, **how)


def call(family, options):
    """Runs on each rank."""
    device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return jobs.step(family, device=device, **options)
