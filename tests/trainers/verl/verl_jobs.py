"""verl's engines and batches, and what a plain Hugging Face model computes of the same samples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from places import DEMO_MODEL
from tensordict import TensorDict
from trainers import conformance
from trainers.conformance import Oracle, Scored, plain_model
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

import r3

LENGTHS = (13, 21, 17, 9)


def samples(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 300, (length,), generator=generator) for length in lengths]


def rows_of(ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the last, whose row is zeros, as verl fills it."""
    return filled(conformance.rows_of(ids)[:-1])


def filled(rows: torch.Tensor) -> torch.Tensor:
    """With a row of zeros for the last token."""
    return torch.nn.functional.pad(rows.to(torch.int16), (0, 0, 0, 0, 0, 1))


def jagged(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def batch(ids: list[torch.Tensor], rows: list[torch.Tensor] | None, **settings: Any) -> TensorDict:
    """As verl's workers get it."""
    fields = dict(
        input_ids=jagged(ids),
        position_ids=jagged([torch.arange(len(part)) for part in ids]),
        loss_mask=jagged([torch.ones(len(part)) for part in ids]),
    )
    if rows is not None:
        fields["routed_experts"] = jagged(rows)
    data = TensorDict(fields, batch_size=[len(ids)])
    defaults = dict(
        use_dynamic_bsz=True,
        max_token_len_per_gpu=40,
        use_remove_padding=True,
        temperature=1.0,
        calculate_entropy=False,
    )
    tu.assign_non_tensor(data, pad_mode=DatasetPadMode.NO_PADDING, **defaults | settings)
    return data


def configs(mode: Any = "R3", *, model: dict | None = None, lr: float = 1e-4, **engine: Any) -> dict[str, Any]:
    """Keyword arguments of an engine of the demo's model in float32."""
    replay = mode if isinstance(mode, dict) else {"mode": mode}
    floats = dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32")
    given = dict(path=str(DEMO_MODEL), override_config={"attn_implementation": "sdpa"}) | (model or {})
    engine = dict(strategy="fsdp2", use_torch_compile=False, mixed_precision=floats, router_replay=replay) | engine
    return dict(
        model_config=HFModelConfig(**given),
        engine_config=FSDPEngineConfig(model_dtype="fp32", **engine),
        optimizer_config=FSDPOptimizerConfig(lr=lr, lr_scheduler_type="constant"),
        checkpoint_config=CheckpointConfig(),
    )


def engine(*args: Any, **settings: Any) -> Any:
    """An initialized engine, of the class that verl's registry gives."""
    kwargs = configs(*args, **settings)
    made = EngineRegistry.new("language_model", kwargs["engine_config"].strategy, **kwargs)
    made.initialize()
    return made


def logprobs(made: Any, data: TensorDict) -> list[torch.Tensor]:
    """Of the next token, for each position but a sample's last."""
    with made.eval_mode():
        output = made.infer_batch(data)
    return [part[:-1].cpu() for part in output["model_output"]["log_probs"].unbind()]


class SeenLoss:
    """Minus the sum of log-probabilities, times `scale`.

    Attributes:
        seen: token ids and log-probabilities, of all tokens but the first, of each sample that it was given.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        parts = [part[:-1] for part in model_output["log_probs"].unbind()]
        self.seen += [
            (ids.cpu(), part.detach().cpu()) for ids, part in zip(data["input_ids"].unbind(), parts, strict=True)
        ]
        return -torch.cat(parts).sum() * self.scale, {}


def loss_of_ranks(made: Any, data: TensorDict) -> SeenLoss:
    """Minus the mean log-probability over the samples of all ranks."""
    tokens = torch.tensor(float(sum(len(part) - 1 for part in data["input_ids"].unbind())))
    dist.all_reduce(tokens, group=made.get_data_parallel_group())
    return SeenLoss(made.get_data_parallel_size() / tokens.item())


def gradients(made: Any, data: TensorDict) -> tuple[dict[str, torch.Tensor], SeenLoss]:
    """Of `loss_of_ranks`, and that loss."""
    loss = loss_of_ranks(made, data)
    with made.train_mode():
        made.optimizer_zero_grad()
        made.forward_backward_batch(data, loss)
        return {
            name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)().clone()
            for name, parameter in made.module.named_parameters()
            if parameter.grad is not None
        }, loss


def gradient_norm(made: Any, data: TensorDict) -> tuple[float, SeenLoss]:
    """Of `loss_of_ranks`, also where parameters are flat, and that loss. Makes a step."""
    loss = loss_of_ranks(made, data)
    with made.train_mode():
        made.optimizer_zero_grad()
        made.forward_backward_batch(data, loss)
        return float(made.optimizer_step()), loss


def oracle(
    ids: list[torch.Tensor],
    rows: list[torch.Tensor] | None,
    change: Callable[[torch.nn.Module], None] = lambda _: None,
) -> Oracle:
    """The plain model with the rows of these samples; rows of zeros are live."""
    model = plain_model()
    change(model)
    known = {}
    for part, mine in zip(ids, rows, strict=True) if rows is not None else ():
        known[tuple(part.tolist())] = mine.masked_fill((mine == 0).all(-1).all(-1)[:, None, None], -1)
    return Oracle(model, known)


def reference(
    ids: list[torch.Tensor],
    rows: list[torch.Tensor] | None,
    change: Callable[[torch.nn.Module], None] = lambda _: None,
) -> tuple[list[torch.Tensor], dict]:
    """Log-probabilities of the plain model, live where rows are None, and gradients of minus their mean."""
    plain = oracle(ids, rows, change)
    result = [plain.logprobs(part, replayed=rows is not None) for part in ids]
    (-torch.cat(result).mean()).backward()
    grads = {name: parameter.grad for name, parameter in plain.model.named_parameters() if parameter.grad is not None}
    return [part.detach().cpu() for part in result], grads


def scored(plain: Oracle, ids: list[torch.Tensor], old: list[torch.Tensor], loss: SeenLoss) -> list[Scored]:
    """Old log-probabilities of samples, and those of the training forwards."""
    return [plain.scored(zip(ids, old, strict=True), in_loss=False), plain.scored(loss.seen)]


def mean_distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Mean difference between two lists of tensors, in nats."""
    return (torch.cat(got) - torch.cat(want)).abs().mean().item()


def furthest_gradient(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, as part of that gradient's own largest entry (of all, where it is tiny)."""
    assert got.keys() == want.keys()
    largest = max(grad.abs().max().item() for grad in want.values())
    return max(
        (got[name] - grad).abs().max().item() / max(grad.abs().max().item(), 1e-3 * largest)
        for name, grad in want.items()
    )


# What ranks of a group do.


def scored_on_ranks(sequence_size: int, settings: dict) -> tuple[list[Scored], float]:
    """The rank's forwards, and the furthest gradient."""
    made = engine("R3", ulysses_sequence_parallel_size=sequence_size, **settings)
    ids = samples()
    mine = ids if sequence_size > 1 else ids[dist.get_rank() :: dist.get_world_size()]
    rows = [rows_of(part) for part in mine]
    old = logprobs(made, batch(mine, rows))
    grads, loss = gradients(made, batch(mine, rows))
    _, want = reference(ids, [rows_of(part) for part in ids])
    return scored(oracle(mine, rows), mine, old, loss), furthest_gradient(grads, want)


def errors_of_gpus(sequence_size: int, settings: dict) -> dict[str, Any]:
    """As `scored_on_ranks`, beside a plain model on the rank's own GPU, with means and the gradients' norms."""
    made = engine("R3", ulysses_sequence_parallel_size=sequence_size, **settings)
    ids = samples()
    mine = ids if sequence_size > 1 else ids[dist.get_rank() :: dist.get_world_size()]
    rows = [rows_of(part) for part in mine]
    data = batch(mine, rows)
    got = logprobs(made, data)
    norm, loss = gradient_norm(made, batch(mine, rows))
    cuda = lambda model: model.cuda()
    replayed, _ = reference(mine, rows, cuda)
    live, _ = reference(mine, None, cuda)
    _, gradient = reference(ids, [rows_of(part) for part in ids], cuda)
    wanted = torch.stack([each.norm() for each in gradient.values()]).norm().item()
    return {
        "scored": scored(oracle(mine, rows, cuda), mine, got, loss),
        "replayed_mean": mean_distance(got, replayed),
        "live_mean": mean_distance(got, live),
        "norm": abs(norm / wanted - 1),
    }


def recorded(made: Any, data: TensorDict) -> list[torch.Tensor]:
    """The routing that old log-probabilities bring with them, by sample."""
    with made.eval_mode():
        return [part.cpu() for part in made.infer_batch(data)["model_output"]["routed_experts"].unbind()]


def recorded_by_reference(ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the plain model chooses for each sample alone."""
    model = plain_model()
    result = []
    for part in ids:
        with r3.record(model) as recorder, torch.no_grad():
            model(input_ids=part[None], use_cache=False)
        result.append(recorder.expert_ids[0].to(torch.int16))
    return result


def forget_routers(module: torch.nn.Module) -> None:
    """Routers that choose otherwise, as after many updates."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gate.weight"):
                parameter.neg_()


def recorded_on_ranks(sequence_size: int, strategy: str = "fsdp2") -> bool:
    """Whether R2 records on each rank what the plain model chooses."""
    made = engine("R2", ulysses_sequence_parallel_size=sequence_size, strategy=strategy)
    ids = samples()
    got = recorded(made, batch(ids, None))
    return all(torch.equal(mine, other) for mine, other in zip(got, recorded_by_reference(ids), strict=True))


def reference_on_ranks(mode: str) -> Scored:
    """A forward of a reference with Ulysses, and sdpa."""
    unpinned = partial(transformer_impl.CPUOffloadPolicy, pin_memory=False)
    transformer_impl.CPUOffloadPolicy, pinned = lambda pin_memory: unpinned(), transformer_impl.CPUOffloadPolicy
    try:
        made = engine(mode, ulysses_sequence_parallel_size=2, forward_only=True)
    finally:
        transformer_impl.CPUOffloadPolicy = pinned
    ids = samples()
    rows = [rows_of(part) for part in ids]
    return oracle(ids, rows).scored(zip(ids, logprobs(made, batch(ids, rows)), strict=True))
