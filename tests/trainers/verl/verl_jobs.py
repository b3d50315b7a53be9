"""verl's engines and batches, and what a plain Hugging Face model computes of the same samples.

Routing is a function of the token: rows of other tokens show as other log-probabilities.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from places import DEMO_MODEL
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

import r3

LENGTHS = (13, 21, 17, 9)
LAYERS, EXPERTS, SLOTS = 8, 32, 4
VOCABULARY = 300


def samples(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


@cache
def _table() -> torch.Tensor:
    scores = torch.rand(VOCABULARY, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2))
    return scores.topk(SLOTS, -1).indices.to(torch.int16)


def rows_of(ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the last, whose row is zeros, as verl fills it."""
    rows = _table()[ids].clone()
    rows[-1] = 0
    return rows


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


def gradients(made: Any, data: TensorDict) -> dict[str, torch.Tensor]:
    """Of `loss_of_ranks`."""
    loss = loss_of_ranks(made, data)
    with made.train_mode():
        made.optimizer_zero_grad()
        made.forward_backward_batch(data, loss)
        return {
            name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)().clone()
            for name, parameter in made.module.named_parameters()
            if parameter.grad is not None
        }


def gradient_norm(made: Any, data: TensorDict) -> float:
    """Of `loss_of_ranks`, also where parameters are flat. Makes a step."""
    loss = loss_of_ranks(made, data)
    with made.train_mode():
        made.optimizer_zero_grad()
        made.forward_backward_batch(data, loss)
        return float(made.optimizer_step())


def loss_of_ranks(made: Any, data: TensorDict) -> Callable:
    """Minus the mean log-probability over the samples of all ranks."""
    tokens = torch.tensor(float(sum(len(part) - 1 for part in data["input_ids"].unbind())))
    dist.all_reduce(tokens, group=made.get_data_parallel_group())

    def loss(model_output: Any, data: Any, dp_group: Any) -> Any:
        total = torch.stack([part[:-1].sum() for part in model_output["log_probs"].unbind()]).sum()
        return -total / tokens.item() * made.get_data_parallel_size(), {}

    return loss


def reference(
    ids: list[torch.Tensor], rows: list[torch.Tensor] | None, change: Callable[[torch.nn.Module], None] = lambda _: None
) -> tuple[list[torch.Tensor], dict]:
    """Log-probabilities and gradients of the plain model, a sample at a time; rows of zeros are live."""
    model = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32)
    change(model)
    replay = r3.attach(model)
    result = []
    for at, part in enumerate(part.to(model.device) for part in ids):
        routing = {}
        if rows is not None:
            mine = rows[at].to(model.device, copy=True)
            mine[(mine == 0).all(-1).all(-1)] = -1
            routing = {"routed_experts": replay.routing(mine[None])}
        logits = model(input_ids=part[None], use_cache=False, **routing).logits[0].log_softmax(-1)
        result.append(logits[:-1].gather(-1, part[1:, None])[:, 0])
    (-torch.cat(result).mean()).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [part.detach().cpu() for part in result], grads


def mean_distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Mean difference between two lists of tensors, in nats."""
    return (torch.cat(got) - torch.cat(want)).abs().mean().item()


def furthest(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest difference between two lists of tensors, in nats."""
    return max((mine - other).abs().max().item() for mine, other in zip(got, want, strict=True))


def furthest_gradient(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, as part of that gradient's own largest entry (of all, where it is tiny)."""
    assert got.keys() == want.keys()
    largest = max(grad.abs().max().item() for grad in want.values())
    return max(
        (got[name] - grad).abs().max().item() / max(grad.abs().max().item(), 1e-3 * largest)
        for name, grad in want.items()
    )


# What ranks of a group do.


def errors_of_ranks(sequence_size: int, settings: dict, data_settings: dict) -> tuple[float, float, float]:
    """Furthest log-probability from the replayed and from the live reference, and the furthest gradient."""
    made = engine("R3", ulysses_sequence_parallel_size=sequence_size, **settings)
    ids = samples()
    mine = ids if sequence_size > 1 else ids[dist.get_rank() :: dist.get_world_size()]
    rows = [rows_of(part) for part in mine]
    got = logprobs(made, batch(mine, rows, **data_settings))
    grads = gradients(made, batch(mine, rows, **data_settings))
    replayed, _ = reference(mine, rows)
    live, _ = reference(mine, None)
    _, want = reference(ids, [rows_of(part) for part in ids])
    return furthest(got, replayed), furthest(got, live), furthest_gradient(grads, want)


def errors_of_gpus(sequence_size: int, settings: dict) -> dict[str, float]:
    """As `errors_of_ranks`, beside a plain model on the rank's own GPU, with means and the gradients' norms."""
    made = engine("R3", ulysses_sequence_parallel_size=sequence_size, **settings)
    ids = samples()
    mine = ids if sequence_size > 1 else ids[dist.get_rank() :: dist.get_world_size()]
    rows = [rows_of(part) for part in mine]
    data = batch(mine, rows)
    got = logprobs(made, data)
    norm = gradient_norm(made, batch(mine, rows))
    cuda = lambda model: model.cuda()
    replayed, _ = reference(mine, rows, cuda)
    live, _ = reference(mine, None, cuda)
    _, gradient = reference(ids, [rows_of(part) for part in ids], cuda)
    wanted = torch.stack([each.norm() for each in gradient.values()]).norm().item()
    return {
        "replayed": furthest(got, replayed),
        "replayed_mean": mean_distance(got, replayed),
        "live": furthest(got, live),
        "live_mean": mean_distance(got, live),
        "norm": abs(norm / wanted - 1),
    }


def recorded(made: Any, data: TensorDict) -> list[torch.Tensor]:
    """The routing that old log-probabilities bring with them, by sample."""
    with made.eval_mode():
        return [part.cpu() for part in made.infer_batch(data)["model_output"]["routed_experts"].unbind()]


def recorded_by_reference(ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the plain model chooses for each sample alone."""
    model = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32)
    result = []
    for part in ids:
        with r3.record(model) as recorder, torch.no_grad():
            model(input_ids=part[None], use_cache=False)
        result.append(recorder.expert_ids[0].to(torch.int16))
    return result


def recorded_on_ranks(sequence_size: int, strategy: str = "fsdp2") -> bool:
    """Whether R2 records on each rank what the plain model chooses."""
    made = engine("R2", ulysses_sequence_parallel_size=sequence_size, strategy=strategy)
    ids = samples()
    got = recorded(made, batch(ids, None))
    return all(torch.equal(mine, other) for mine, other in zip(got, recorded_by_reference(ids), strict=True))


def reference_on_ranks(mode: str) -> float:
    """How far a reference with Ulysses, and sdpa, is from the plain model without replay."""
    unpinned = partial(transformer_impl.CPUOffloadPolicy, pin_memory=False)
    transformer_impl.CPUOffloadPolicy, pinned = lambda pin_memory: unpinned(), transformer_impl.CPUOffloadPolicy
    try:
        made = engine(mode, ulysses_sequence_parallel_size=2, forward_only=True)
    finally:
        transformer_impl.CPUOffloadPolicy = pinned
    ids = samples()
    return furthest(logprobs(made, batch(ids, [rows_of(part) for part in ids])), reference(ids, None)[0])
