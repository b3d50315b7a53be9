"""swift's GRPO pipeline with r3's trainer and the vLLM engine that swift starts in its process: nothing stands in."""

import pytest
from swift_runs import run_with_engine
from trainers.conformance import EQUAL, check_gap, check_replayed

from trainer_hooks.ms_swift import engine

pytestmark = pytest.mark.engine


def checked(made, own, live, equal=EQUAL):
    """Each forward is the plain replayed one, swift's mismatch falls to a third, and the engine has the weights."""
    assert sum(each.in_loss for each in made.scored) == 8
    check_replayed(made.scored, equal)
    check_gap(own, live)
    assert made._sync.version == 2  # one a generation
    assert engine.as_llm(made.engine.engine).collective_rpc("r3_status")[0]["state"] == "idle"


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20, "top_p": 0.9}], ids=["whole", "cut"])
def test_a_run_with_its_engine(tmp_path, sampling):
    """swift's own sync cannot reload this engine on a CPU; r3's can. Replay lowers the gap to a third."""
    pytest.importorskip("vllm")
    made, *gaps = run_with_engine(tmp_path, ddp_backend="gloo", **sampling)
    checked(made, *gaps)
    assert all((known.sets is not None) == bool(sampling) for known in made.known.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"sleep_level": 1, "gradient_checkpointing": True}, {"tuner_type": "lora", "lora_dropout": 0.0}],
    ids=["awake", "sleep", "lora"],
)
def test_a_run_with_its_engine_on_a_gpu(tmp_path, settings):
    # Of a float32 model swift makes a float16 one on a GPU, unless it is told.
    made, *gaps = run_with_engine(tmp_path, fp16=False, bf16=False, **settings)
    print(settings, gaps, *(f"{each.replayed:.1e}/{each.live:.1e}" for each in made.scored))
    checked(made, *gaps, 1e-4)  # beside a plain model on the CPU
