"""What ranks compute in tests/parallel/test_parallel.py: one training step of a tiny model, in every layout."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import DynamicCache
from zoo import CASES

import r3
from r3 import SyncError
from r3.parallel import (
    fused_head,
    gather_sequence,
    make_mesh,
    mean_over_ranks,
    next_tokens,
    shard_parameters,
    token_logprobs,
    ulysses,
)
from r3.routing import Packing, RolloutRouting, shard
from r3.weight_sync import WeightSync, combine, gathered, named_weights
from r3.weight_sync.engines import Engine
from r3.wrappers import own_path
from trainer_hooks.publish import push_from_all_ranks

LENGTHS = (7, 4, 9, 3)
WIDTH = 10
FAMILIES = {
    "softmax": "qwen3_moe",
    "sigmoid, bias, groups": "deepseek_v3",
    "gpt-oss": "gpt_oss",
    "dense first": "glm4_moe",
}
# Eight query heads, over two key-value heads where the family groups them: fewer than a group of four has ranks. Heads
# of 64 are what FlashAttention and flex attention can do on a GPU.
HEADS = {
    "softmax": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64),
    "sigmoid, bias, groups": dict(num_attention_heads=8, num_key_value_heads=8),
    "gpt-oss": dict(num_attention_heads=8, num_key_value_heads=2),
    "dense first": dict(num_attention_heads=8, num_key_value_heads=2),
}


def build(family: str, *, tied: bool = False) -> tuple[torch.nn.Module, r3.Replay]:
    case = CASES[FAMILIES[family]]
    text = {**case.text, **HEADS[family]} | ({"tie_word_embeddings": True} if tied else {})
    model = dataclasses.replace(case, text=text).build()
    return model, r3.attach(model, required=True)


@dataclasses.dataclass
class Batch:
    """Right-padded samples; the first two tokens of each are its prompt."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    routing: RolloutRouting


# Families whose rows lack layers; those of the others are valid in all or in none.
LACKING = {"sigmoid, bias, groups", "gpt-oss"}


def batch_for(replay: r3.Replay, family: str) -> Batch:
    generator = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), WIDTH)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    spec = replay.spec
    scores = torch.rand(*shape, len(spec.layer_ids), spec.num_experts, generator=generator)
    captured = mask & (torch.rand(shape, generator=generator) < 0.8)
    if family in LACKING:
        captured = captured[..., None] & (torch.rand(scores.shape[:3], generator=generator) < 0.7)
    routing = RolloutRouting(
        scores.argsort(-1)[..., : spec.top_k], captured, spec.layer_ids, spec.num_experts, weight_version=1
    )
    weights = torch.randn(shape, generator=generator) * (mask & (torch.arange(WIDTH) >= 2))
    return Batch(torch.randint(1, 60, shape, generator=generator) * mask, mask, weights, routing)


def select(batch: Batch, samples: slice) -> Batch:
    return Batch(batch.input_ids[samples], batch.mask[samples], batch.weights[samples], batch.routing.select(samples))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name] = gradient.detach().float().cpu().clone()
    return found


def reference(family: str, *, tied: bool = False) -> dict[str, Any]:
    """One process, float32, each sample alone, stock attention, no checkpointing."""
    model, replay = build(family, tied=tied)
    model.train()
    batch = batch_for(replay, family)
    logprobs = torch.zeros(batch.mask.shape)
    for b, length in enumerate(LENGTHS):
        routing = batch.routing.select([b]).pack(Packing.from_mask(batch.mask[b : b + 1]))
        logits = model(input_ids=batch.input_ids[b : b + 1, :length], routed_experts=routing, use_cache=False).logits
        found = logits[0, :-1].log_softmax(-1).gather(-1, batch.input_ids[b, 1:length, None])[:, 0]
        logprobs[b, 1:length] = found
    loss = -(logprobs * batch.weights).sum() / (batch.weights != 0).sum()
    loss.backward()
    return {"logprobs": logprobs.detach(), "loss": float(loss.detach()), "grads": gradients(model)}


def step(
    family: str,
    *,
    layout: str = "packed",
    sequence: int = 1,
    fsdp: bool | str = False,
    checkpointing: bool | str = False,
    side: str = "right",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    compiled: str | None = None,
    fused: bool = False,
    tied: bool = False,
    tamper: Any = None,
) -> dict[str, Any]:
    """The same step on all ranks: rows by data rank, slices by sequence rank. `tamper` changes this rank's input."""
    model, replay = build(family, tied=tied)
    model.to(device).train()
    if attention is not None:
        model.config._attn_implementation = attention
    head = fused_head(model) if fused else None
    mesh = make_mesh(device, sequence)
    attached = ulysses(model, mesh.sequence_group, barrier=r3.parallel.RankBarrier(timeout_s=30))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if compiled == "layers":
        for layer in model.model.layers:
            layer.compile()
    elif compiled == "model":
        model.compile()
    trained: Any = model
    if fsdp == "fsdp1":
        trained = wrapped_by_fsdp1(model, use_orig_params=True)
    elif fsdp:
        trained = shard_parameters(model, mesh, param_dtype=dtype)
    whole = batch_for(replay, family)
    mine = slice(mesh.data_rank, None, mesh.data_size) if fsdp or mesh.data_size > 1 else slice(None)
    part = select(whole, mine)
    tokens, mask, weights, routing = part.input_ids, part.mask, part.weights, part.routing
    if side == "left":
        turned = Packing.from_mask(mask)
        moved = Packing.from_mask(mask.flip(1))
        tokens, weights = (moved.unpack(turned.pack(t)) for t in (tokens, weights))
        routing, mask = routing.pack(turned).unpack(moved), mask.flip(1)
    if layout == "packed":
        packing = Packing.from_mask(mask)
    elif layout == "rows":
        packing = Packing.from_mask(mask, row_length=int(mask.sum(1).max()) + 3)
    else:
        packing = None
    if packing is not None:
        tokens, weights, routing = packing.pack(tokens), packing.pack(weights), routing.pack(packing)
        positions = packing.position_ids()
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0) * mask
    # What belongs to the token that a position predicts.
    labels = next_tokens(tokens, positions)
    shifted = weights.roll(-1, 1) * (labels != -100)
    rank, size = mesh.sequence_rank, mesh.sequence_size
    local: dict[str, Any] = {
        "input_ids": shard(tokens, rank, size).to(device),
        "position_ids": shard(positions, rank, size).to(device),
        "routed_experts": routing.shard(rank, size).to(device),
    }
    labels, shifted = shard(labels, rank, size, fill=-100).to(device), shard(shifted, rank, size).to(device)
    if tamper is not None:
        local = tamper(local, rank, positions, routing)
    if head is not None:
        found = head.logprobs(trained, labels, **local, use_cache=False)
    else:
        found = token_logprobs(trained(**local, use_cache=False).logits, labels)
    loss = mean_over_ranks(-(found * shifted).sum(), (shifted != 0).sum())
    loss.backward()
    if not fsdp:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
    value = loss.detach().clone()
    dist.all_reduce(value)
    # Back to [B, S], aligned with tokens.
    gathered = found.detach() if mesh.sequence_group is None else gather_sequence(found.detach(), mesh.sequence_group)
    gathered = gathered.cpu()[:, : tokens.shape[1]].roll(1, 1)
    logprobs = packing.unpack(gathered) if packing is not None else gathered
    if side == "left":
        logprobs = turned.unpack(moved.pack(logprobs))
    everyone = torch.zeros(whole.mask.shape)
    everyone[mine] = logprobs * (torch.arange(WIDTH) > 0) * part.mask
    if mesh.data_size > 1:
        dist.all_reduce(everyone)
        everyone /= mesh.sequence_size
    grads = gradients_under_fsdp1(trained) if fsdp == "fsdp1" else gradients(trained)
    result = {"logprobs": everyone, "loss": float(value) / dist.get_world_size(), "grads": grads}
    attached.detach()
    return result if dist.get_rank() == 0 else {"loss": result["loss"]}


def response_mask() -> torch.Tensor:
    return (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]) & (torch.arange(WIDTH) >= 2)


# Mistakes. Each gets one rank's keyword arguments, and the whole rows that they were cut from.


def replaced(routing: RolloutRouting, ids: torch.Tensor, valid: torch.Tensor) -> RolloutRouting:
    return RolloutRouting(ids, valid, routing.layer_ids, routing.num_experts)


def shifted(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    moved = replaced(routing, routing.expert_ids.roll(1, 1), routing.valid.roll(1, 1))
    return local | {"routed_experts": moved.shard(rank, 2)}


def swapped(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    first, second = LENGTHS[0], LENGTHS[1]
    order = [*range(first, first + second), *range(first), *range(first + second, routing.shape[1])]
    return local | {
        "routed_experts": replaced(routing, routing.expert_ids[:, order], routing.valid[:, order]).shard(rank, 2)
    }


def wrong_slice(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | {"routed_experts": routing.shard(1 - rank, 2)}


def sequence_first(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    part = local["routed_experts"]
    _, s, n, k = part.shape
    mixed = part.expert_ids.view(2, s // 2, n, k).transpose(0, 1).reshape(1, s, n, k)
    return local | {"routed_experts": replaced(part, mixed, part.valid.view(2, s // 2).t().reshape(1, s))}


def wrong_positions(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | {"position_ids": shard(positions, 1 - rank, 2)}


def short_routing(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | ({"routed_experts": routing.shard(1, 3)} if rank else {})


def short_input(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    if not rank:
        return local
    cut = {name: local[name][:, :-1] for name in ("input_ids", "position_ids")}
    part = local["routed_experts"]
    return local | cut | {"routed_experts": replaced(part, part.expert_ids[:, :-1], part.valid[:, :-1])}


def no_routing(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return {name: given for name, given in local.items() if rank == 0 or name != "routed_experts"}


def plain_tensor(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | {"routed_experts": local["routed_experts"].expert_ids}


def no_positions(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return {name: given for name, given in local.items() if name != "position_ids"}


def with_labels(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | {"labels": local["input_ids"]}


def with_past(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | {"past_key_values": DynamicCache()}


def with_cache(local: dict, rank: int, positions: torch.Tensor, routing: RolloutRouting) -> dict:
    return local | {"cache": DynamicCache()}


def fails_on_one_rank() -> None:
    with r3.parallel.RankBarrier().guard():
        if dist.get_rank() == 1:
            raise KeyError("no such sample")


def stays_away() -> str:
    if dist.get_rank() == 0:
        r3.parallel.RankBarrier(timeout_s=2).exchange(None)
    return "elsewhere"


class BrokenEngine(Engine):
    """Stands for an engine whose worker is lost when the second chunk comes."""

    name = "engine"
    remedy = ""

    def __init__(self) -> None:
        self.loads = 0

    def replies(self, method: str, args: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
        self.loads += method == "r3_load"
        if self.loads > 1:
            raise SyncError("worker lost")
        digest = combine(args[1]) if method == "r3_seal" else 0
        who = {"rank": 0, "dp_rank": 0, "world_size": 1, "dp_size": 1, "worker": "only"}
        return [
            who
            | {
                "state": "idle",
                "cause": "",
                "version": None,
                "connection_id": None,
                "base_version": None,
                "constants": [],
                "gpu": None,
                "digest": digest,
            }
        ]

    def pause(self, timeout_s: float) -> bool:
        return True

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    resume = reset_caches = set_weight_version = refuse = nothing


def push_fails_midway() -> None:
    """A sync of the trainer's, on the rank with the engine and on the others."""
    model, _ = build("softmax")
    shard_parameters(model, make_mesh("cpu"), param_dtype=torch.float32)
    sync = WeightSync(BrokenEngine(), chunk_bytes=1 << 14) if dist.get_rank() == 0 else None
    push_from_all_ranks(sync, named_weights(model), 1, r3.parallel.RankBarrier(timeout_s=30))


def gather_fails_on_one_rank() -> None:
    """A rank cannot make one of the weights."""
    model, _ = build("softmax")
    shard_parameters(model, make_mesh("cpu"), param_dtype=torch.float32)
    weights = named_weights(model)
    if dist.get_rank() == 1:
        name, source = weights[3]

        def fails():
            gathered(source)
            raise MemoryError(f"no memory for {name}")

        weights[3] = (name, dataclasses.replace(source, make=fails))
    sync = WeightSync(BrokenEngine(), chunk_bytes=1 << 40) if dist.get_rank() == 0 else None
    push_from_all_ranks(sync, weights, 1, r3.parallel.RankBarrier(timeout_s=10))


def alone_and_sliced(name: str) -> dict[str, float] | str:
    """Two sequences of any family, each alone with stock attention, and packed over the ranks: largest differences.

    Returns why, if the family is refused.
    """
    case = CASES[name]
    model = case.build()
    ids = case.inputs(2, 7)["input_ids"]
    packing = Packing.from_mask(torch.arange(7) < torch.tensor([[7], [6]]), multiple_of=dist.get_world_size())
    generator = torch.Generator().manual_seed(2)
    expected, wanted = [], []
    for b, length in enumerate((7, 6)):
        logits = model(input_ids=ids[b : b + 1, :length], use_cache=False).logits
        wanted.append(torch.randn(logits.shape, generator=generator))
        (logits * wanted[-1]).sum().backward()
        expected.append(logits.detach())
    gradients_alone = gradients(model)
    model.zero_grad()
    try:
        attached = ulysses(model, dist.group.WORLD)
        rank, size = attached.rank, attached.size
        tokens, positions = packing.pack(ids), packing.position_ids()
        weights = shard(pad_row(torch.cat(wanted, 1), packing.shape[1]), rank, size)
        logits = model(
            input_ids=shard(tokens, rank, size), position_ids=shard(positions, rank, size), use_cache=False
        ).logits
    except r3.ParallelError as error:
        return str(error)
    (logits * weights).sum().backward()
    worst = 0.0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in gradients_alone:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            alone = gradients_alone[parameter_name]
            worst = max(worst, float((gradient - alone).abs().max() / (alone.abs().max() + 1e-6)))
    inside = shard(pad_row(torch.ones(1, 13, 1), packing.shape[1]), rank, size)
    wrong = (logits.detach() - shard(pad_row(torch.cat(expected, 1), packing.shape[1]), rank, size)) * inside
    return {"logits": float(wrong.abs().max()), "gradients": worst}


def pad_row(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]))


def on_meta(family: str, where: Sequence[int], *, fsdp: bool, attached_last: bool = False) -> dict[str, float]:
    """A model that is on meta on the ranks in `where` when Ulysses attention is attached, and gets its weights later.

    Returns the largest differences of logits and of gradients from one whole forward with stock attention.
    """
    whole, replay = build(family)
    batch = batch_for(replay, family)
    packing = Packing.from_mask(batch.mask, multiple_of=dist.get_world_size())
    routing, tokens = batch.routing.pack(packing), packing.pack(batch.input_ids)
    alone = ulysses(whole)
    expected = whole(
        input_ids=tokens, position_ids=packing.position_ids(), routed_experts=routing, use_cache=False
    ).logits
    wanted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * wanted).sum().backward()
    alone.detach()
    replay.detach()

    with torch.device("meta" if dist.get_rank() in where else "cpu"):
        model = type(whole)(copy.deepcopy(whole.config)).train()
    r3.attach(model)
    if not attached_last:
        ulysses(model, dist.group.WORLD)
    if fsdp:
        shard_parameters(model, make_mesh("cpu"), param_dtype=torch.float32)
    if attached_last:
        ulysses(model, dist.group.WORLD)
    filled_from_rank_0(model, whole, where)
    rank, size = dist.get_rank(), dist.get_world_size()
    logits = model(
        input_ids=shard(tokens, rank, size),
        position_ids=shard(packing.position_ids(), rank, size),
        routed_experts=routing.shard(rank, size),
        use_cache=False,
    ).logits
    (logits * shard(wanted, rank, size)).sum().backward()
    found = gradients(model)
    worst = 0.0
    for name, gradient in gradients(whole).items():
        mine = found.get(name, torch.zeros_like(gradient))
        if fsdp:
            mine = mine * size  # the mean over ranks
        else:
            dist.all_reduce(mine)
        worst = max(worst, float((mine - gradient).abs().max() / (gradient.abs().max() + 1e-6)))
    return {"logits": float((logits - shard(expected, rank, size)).detach().abs().max()), "gradients": worst}


def filled_from_rank_0(model: torch.nn.Module, whole: torch.nn.Module, where: Sequence[int]) -> None:
    """As trainers load a checkpoint on one rank: the others have only meta tensors until then."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if dist.get_rank() in where:
        model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = whole.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=options)
    buffers = dict(whole.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name] if dist.get_rank() == 0 else torch.zeros_like(buffers[name]))
        dist.broadcast(buffer, 0)
    for module, of in zip(model.modules(), whole.modules(), strict=True):
        if isinstance(getattr(module, "original_inv_freq", None), torch.Tensor):
            module.original_inv_freq = of.original_inv_freq


def under_fsdp1(use_orig_params: bool) -> dict[str, Any]:
    """A training step with gradient checkpointing: the plain replayed model, and one attached before FSDP1 wraps it.

    Returns logits, loss and gradients of both, by whose they are.
    """
    found = {}
    for kind in ("plain", "fsdp1"):
        model, replay = build("softmax")
        batch = batch_for(replay, "softmax")
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        if kind == "fsdp1":
            model = wrapped_by_fsdp1(model, use_orig_params)
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        part = select(batch, mine)
        logits = model(
            input_ids=part.input_ids, attention_mask=part.mask.long(), routed_experts=part.routing, use_cache=False
        ).logits
        loss = -(logits[:, :-1].log_softmax(-1).gather(-1, part.input_ids[:, 1:, None])[..., 0] * part.weights[:, 1:])
        loss = loss.sum()
        loss.backward()
        assert replay.last.rows_replayed > 0
        if kind == "fsdp1":
            grads = gradients_under_fsdp1(model) if use_orig_params else {}
            norm = float(model.clip_grad_norm_(1e9))
        else:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
            grads = gradients(model)
            norm = float(torch.stack([gradient.norm() for gradient in grads.values()]).norm())
        found[kind] = {"logits": logits.detach(), "loss": float(loss.detach()), "grads": grads, "norm": norm}
    return found


def gradients_under_fsdp1(model: Any) -> dict[str, torch.Tensor]:
    with type(model).summon_full_params(model, with_grads=True):
        return {own_path(name): gradient for name, gradient in gradients(model.module).items()}


def wrapped_by_fsdp1(model: torch.nn.Module, use_orig_params: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in model.model.layers}),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )


def too_late(use_orig_params: bool) -> dict[str, str]:
    """What attaching says after FSDP1 has wrapped a model, and `named_weights`."""
    model, replay = build("softmax")
    replay.detach()
    wrapped = wrapped_by_fsdp1(model, use_orig_params)
    said = {}
    for name, call in (("attach", r3.attach), ("ulysses", ulysses), ("named_weights", named_weights)):
        for place, given in (("around", wrapped), ("inside", wrapped.module)):
            with pytest.raises(r3.R3Error) as refusal:
                call(given)
            said[f"{name}, {place}"] = f"{refusal.typename}: {refusal.value}"
    return said
