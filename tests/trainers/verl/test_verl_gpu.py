"""What verl's FSDP engines do on GPUs only: FSDP1, and Ulysses in verl's own FlashAttention."""

import contextlib

import pytest
from ranks import Ranks
from verl_jobs import logprob_errors_of_ranks

pytestmark = pytest.mark.gpu(count=2)


@pytest.fixture(scope="module")
def two_gpus():
    """Ranks with verl's own platform."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VERL_PLATFORM")
        patch.setenv("VERL_USE_EXTERNAL_MODULES", "trainer_hooks.verl")
        with contextlib.closing(Ranks(2, "cuda")) as ranks:
            yield ranks


@pytest.mark.parametrize("settings", [{}, {"use_orig_params": True}, {"param_offload": True}], ids=str)
def test_fsdp1(two_gpus, settings):
    for replayed, live in two_gpus.all(logprob_errors_of_ranks, 1, {"strategy": "fsdp"} | settings):
        assert replayed < 1e-3  # float32, beside a CPU's
        assert live > 1


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_ulysses_in_flash_attention(two_gpus, strategy):
    pytest.importorskip("flash_attn")
    settings = dict(
        strategy=strategy,
        mixed_precision=dict(param_dtype="bf16", reduce_dtype="fp32", buffer_dtype="fp32"),
        model={"override_config": {"attn_implementation": "flash_attention_2"}},
    )
    for replayed, live in two_gpus.all(logprob_errors_of_ranks, 2, settings):
        assert replayed < 0.5  # bfloat16, beside float32
        assert live > 1
