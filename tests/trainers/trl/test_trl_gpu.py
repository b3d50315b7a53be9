"""TRL with an engine on the trainer's own GPU, and asleep while it trains.

python -m pytest tests/trainers/trl/test_trl_gpu.py -m gpu
"""

import pytest
from trl_runs import check, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@pytest.mark.parametrize(
    ("kind", "asleep"), [("grpo", False), ("grpo", True), ("rloo", False)], ids=["awake", "sleep-mode", "rloo"]
)
def test_a_colocated_engine_is_replayed_and_synced(tmp_path, kind, asleep):
    made = trainer(
        tmp_path,
        kind=kind,
        use_cpu=False,
        max_steps=3,
        max_completion_length=32,
        vllm_enable_sleep_mode=asleep,
        gradient_checkpointing=True,
    )
    made.train()
    print(kind, *(f"{each.replayed:.1e}/{each.live:.1e}" for each in made.scored))
    assert sum(each.in_loss for each in made.scored if each.sequences and not each.reference) == 3
    check(made.scored, made.state.log_history, 1e-3)  # a GPU's float32 against a CPU's
    assert made._sync.poisoned is None
    assert made._sync.version >= 3
