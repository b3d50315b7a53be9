"""R2: the update replays the routing with which the old log-probabilities were computed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from trainers.conformance import check_replayed
from verl import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.padding import left_right_2_no_padding
from verl_jobs import (
    SeenLoss,
    batch,
    configs,
    engine,
    forget_routers,
    logprobs,
    oracle,
    recorded,
    recorded_by_reference,
    recorded_on_ranks,
    samples,
)

from r3 import ReplayError


def trained(made: Any, data: Any) -> SeenLoss:
    """The loss of a training forward."""
    loss = SeenLoss()
    with made.train_mode():
        made.forward_backward_batch(data, loss)
    return loss


@pytest.mark.parametrize("padded", [False, True])
def test_the_routing_of_the_old_logprobs_is_recorded(one_rank, padded):
    made = engine("R2")
    ids = samples()
    got = recorded(made, batch(ids, None, use_remove_padding=not padded))
    for mine, other in zip(got, recorded_by_reference(ids), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("sequence_size", [1, 2], ids=["data parallel", "Ulysses"])
def test_recorded_on_two_ranks(two_ranks, sequence_size):
    assert two_ranks.all(recorded_on_ranks, sequence_size) == [True, True]


def test_the_update_replays_what_was_recorded(one_rank):
    """Through the trainer's own steps: old log-probabilities of a padded batch, put into it, and sent to the update."""
    worker = TrainingWorker(config=TrainingWorkerConfig(model_type="language_model", **configs("R2")))
    worker.reset()
    actor = OmegaConf.create({"actor_rollout_ref": {"actor": {}}})
    ids, prompt, response = samples(), 5, 20
    pad = torch.nn.functional.pad
    mask = torch.stack([pad(torch.ones_like(part), (0, prompt + response - len(part))) for part in ids])
    whole = DataProto.from_dict(
        tensors=dict(
            input_ids=torch.stack([pad(part, (0, prompt + response - len(part))) for part in ids]),
            prompts=torch.stack([part[:prompt] for part in ids]),
            responses=torch.stack([pad(part[prompt:], (0, prompt + response - len(part))) for part in ids]),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            response_mask=mask[:, prompt:],
        ),
        meta_info=dict(max_token_len_per_gpu=40, temperature=1.0, global_token_num=[len(part) for part in ids]),
    )
    order = (2, 0, 3, 1)
    whole.reorder(torch.tensor(order))  # as verl balances its ranks
    trainer = SimpleNamespace(config=actor, actor_rollout_wg=SimpleNamespace(compute_log_prob=worker.infer_batch))
    old, _ = RayPPOTrainer._compute_old_log_prob(trainer, whole)
    whole = whole.union(old)
    forget_routers(worker.engine.module)

    data = left_right_2_no_padding(whole.to_tensordict())
    tu.assign_non_tensor(data, max_token_len_per_gpu=200, calculate_entropy=False)
    loss = trained(worker.engine, data)
    check_replayed([oracle(ids, recorded_by_reference(ids), forget_routers).scored(loss.seen)])


def test_without_a_recording_the_update_is_refused(one_rank):
    made = engine("R2")
    with pytest.raises(ReplayError, match=r"mode=R2.*no `routed_experts`.*bypass_mode=False"):
        trained(made, batch(samples(), None, max_token_len_per_gpu=200))


def test_the_rollouts_routing_beside_it_is_refused(one_rank):
    made = engine("R2")
    with pytest.raises(ReplayError, match=r"R2 with .*enable_rollout_routing_replay=True.*=False, or the mode to R3"):
        logprobs(made, batch(samples(), recorded_by_reference(samples())))
