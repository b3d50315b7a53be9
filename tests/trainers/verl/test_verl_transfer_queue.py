"""verl's own trainer passes its batches through a TransferQueue: routing goes in and out of it with them."""

import pytest
import ray
import torch
import transfer_queue
from tensordict import TensorDict
from trainers.conformance import EQUAL, check_replayed, furthest
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl_jobs import (
    SeenLoss,
    batch,
    configs,
    forget_routers,
    jagged,
    oracle,
    recorded_by_reference,
    reference,
    rows_of,
    samples,
)


@pytest.fixture(scope="module")
def queue():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or Ray writes a token into the home folder
        # As many as its actors ask for: they only hold tensors.
        ray.init(num_cpus=16, include_dashboard=False, object_store_memory=100 * 2**20)
        transfer_queue.init()
        yield
        transfer_queue.close()
        ray.shutdown()


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_old_logprobs_and_update_of_the_workers(one_rank, queue, mode):
    """As the trainer does it: old log-probabilities by the workers, put back by the trainer, and an update."""
    worker = TrainingWorker(config=TrainingWorkerConfig(model_type="language_model", **configs(mode, lr=0.0)))
    worker.reset()
    loss = SeenLoss()
    worker.set_loss_fn(loss)
    ids = samples()
    rows = [rows_of(part) for part in ids] if mode == "R3" else recorded_by_reference(ids)
    data = batch(ids, rows if mode == "R3" else None)
    fields = data.select(*[name for name in data.keys() if isinstance(data[name], torch.Tensor)])  # noqa: SIM118
    where = dict(partition_id=mode)
    settings = dict(use_remove_padding=True, use_dynamic_bsz=True, temperature=1.0, calculate_entropy=False)

    sent = transfer_queue.kv_batch_put(
        keys=[f"{mode}-{at}" for at in range(len(ids))], fields=fields, tags=[{} for _ in ids], **where
    )
    sent.extra_info.update(settings | dict(max_token_len_per_gpu=40, compute_loss=False))
    sent = worker.infer_batch(sent)
    old = transfer_queue.kv_batch_get(keys=sent.keys, select_fields=["log_probs"], **where)["log_probs"].unbind()

    sent = transfer_queue.kv_batch_put(
        keys=sent.keys, fields=TensorDict({"old_log_probs": jagged(list(old))}, batch_size=[len(ids)]), **where
    )
    if mode == "R2":
        forget_routers(worker.engine.module)  # else a live update would choose the same
    order = dict(mini_batch_size=2, epochs=1, seed=3, dataloader_kwargs={"shuffle": True})
    sent.extra_info.update(settings | order | dict(max_token_len_per_gpu=200))
    worker.train_mini_batch(sent)
    want, _ = reference(ids, rows)
    assert furthest([part[:-1] for part in old], want) < EQUAL
    plain = oracle(ids, rows, forget_routers) if mode == "R2" else oracle(ids, rows)
    check_replayed([plain.scored(loss.seen)])
    assert len(loss.seen) == len(ids)
