"""What verl's FSDP engines do on GPUs only: FSDP1, and Ulysses in verl's own FlashAttention."""

import contextlib

import pytest
from ranks import Ranks
from trainers.conformance import check_replayed
from verl_jobs import errors_of_gpus, recorded_on_ranks

pytestmark = pytest.mark.gpu(count=2)
BFLOAT16 = {"mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}}
FLASH = {"model": {"override_config": {"attn_implementation": "flash_attention_2"}}}


@pytest.fixture(scope="module")
def two_gpus():
    """Ranks with verl's own platform."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VERL_PLATFORM")
        patch.setenv("VERL_USE_EXTERNAL_MODULES", "trainer_hooks.verl")
        with contextlib.closing(Ranks(2, "cuda")) as ranks:
            yield ranks


@pytest.mark.parametrize("sequence_size", [1, 2], ids=["data parallel", "Ulysses"])
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "use_orig_params": True},
        {"strategy": "fsdp", "param_offload": True, "optimizer_offload": True},
        {"strategy": "fsdp2"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_float32(two_gpus, settings, sequence_size):
    """Ulysses of r3's, with sdpa. The second rank starts from a model on meta."""
    for errors in two_gpus.all(errors_of_gpus, sequence_size, settings, timeout_s=200):
        print(sequence_size, settings, errors)
        check_replayed(errors["scored"], 1e-4)
        assert errors["norm"] < 1e-3


@pytest.mark.parametrize("sequence_size", [1, 2], ids=["data parallel", "Ulysses"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_flash_attention_in_bfloat16(two_gpus, strategy, sequence_size):
    pytest.importorskip("flash_attn")
    settings = dict(strategy=strategy, **BFLOAT16, **FLASH)
    for errors in two_gpus.all(errors_of_gpus, sequence_size, settings, timeout_s=200):
        print(sequence_size, strategy, errors)
        assert max(each.replayed for each in errors["scored"]) < 0.5
        assert errors["replayed_mean"] < errors["live_mean"] / 10
        assert errors["norm"] < 0.2


@pytest.mark.parametrize("sequence_size", [1, 2], ids=["data parallel", "Ulysses"])
def test_r2_records_the_choices_over_nccl(two_gpus, sequence_size):
    assert all(two_gpus.all(recorded_on_ranks, sequence_size, "fsdp"))
