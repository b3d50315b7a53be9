"""What ranks compute in test_images.py: sequences with images alone, padded, packed, and sliced over ranks."""

from collections.abc import Sequence
from typing import Any

import pictures
import torch
import torch.distributed as dist
from parallel_jobs import gradients
from torch import Tensor, nn

import r3
from r3.parallel import ulysses
from r3.routing import Packing, RolloutRouting, shard


def compare(name: str, images: Sequence[int], replayed: bool) -> dict[str, dict[str, float]] | str:
    """Largest differences of logits and gradients from each sequence alone, with stock attention, by layout.

    Args:
        images: of each sequence.
        replayed: whether routing is replayed; the same everywhere.

    Returns:
        Why, if the family is refused.
    """
    model = pictures.build(name)
    try:
        ulysses(model, dist.group.WORLD).detach()
    except r3.ParallelError as error:
        return str(error)
    samples = [pictures.sample(model, count, seed) for seed, count in enumerate(images)]
    replay = r3.attach(model, required=True) if replayed else None
    routing = [random_routing(replay, len(one.ids), seed) for seed, one in enumerate(samples)] if replay else None
    weights = [
        torch.randn(len(one.ids), 64, generator=torch.Generator().manual_seed(seed)) for seed, one in enumerate(samples)
    ]
    model.train()
    expected = []
    for b, one in enumerate(samples):
        ids = one.ids[None]
        given = pictures.beside(model, [one]) | pictures.type_ids(model, ids)
        given |= {"attention_mask": torch.ones_like(ids), "use_cache": False}
        logits = model(input_ids=ids, **given, **({"routed_experts": routing[b]} if routing else {})).logits
        (logits[0] * weights[b]).sum().backward()
        expected.append(logits[0].detach())
    alone = gradients(model)
    found = {}
    for layout, group in (("padded", None), ("packed", None), ("sliced", dist.group.WORLD)):
        model.zero_grad()
        attached = ulysses(model, group)
        try:
            found[layout] = difference(model, attached, layout, samples, routing, weights, expected, alone)
        except r3.ParallelError as error:
            return str(error)
        finally:
            attached.detach()
    return found


def difference(
    model: nn.Module,
    attached: Any,
    layout: str,
    samples: Sequence[pictures.Sample],
    routing: Sequence[RolloutRouting] | None,
    weights: Sequence[Tensor],
    expected: Sequence[Tensor],
    alone: dict[str, Tensor],
) -> dict[str, float]:
    longest = max(len(one.ids) for one in samples)
    mask = torch.arange(longest) < torch.tensor([[len(one.ids)] for one in samples])
    packing = Packing.from_mask(mask, multiple_of=attached.size)
    ids, wanted, right = (
        torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)
        for tensors in ([one.ids for one in samples], weights, expected)
    )
    own = [pictures.rope_index(model, one) for one in samples]
    rope = None
    if own[0] is not None:
        rope = torch.stack([torch.nn.functional.pad(p[:, 0], (0, longest - p.shape[-1])) for p in own], 1)
    routed = None
    if routing:
        routed = RolloutRouting.cat([part.pad(longest) for part in routing])
    if layout == "padded":
        positions = torch.arange(longest) * mask if rope is None else rope
    else:
        ids, wanted, right = (packing.pack(tensor) for tensor in (ids, wanted, right))
        positions = packing.position_ids(multimodal=rope)
        mask, routed = packing.pack(mask), routed and routed.pack(packing)
    rank, size = attached.rank, attached.size

    def mine(tensor: Tensor) -> Tensor:
        return shard(tensor, rank, size, dim=1)

    given: dict[str, Any] = {name: mine(tensor) for name, tensor in pictures.type_ids(model, ids).items()}
    given["position_ids"] = shard(positions, rank, size, dim=positions.dim() - 1)
    if layout == "padded":
        given["attention_mask"] = mask
    if routed:
        given["routed_experts"] = routed.shard(rank, size)
    logits = model(input_ids=mine(ids), **given, **pictures.beside(model, samples), use_cache=False).logits
    (logits * mine(wanted)).sum().backward()
    worst = 0.0
    # Some gradients are zero but for rounding: that of a key's bias.
    least = 1e-4 * max(float(gradient.abs().max()) for gradient in alone.values())
    for name, parameter in model.named_parameters():
        if name in alone:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if size > 1:
                dist.all_reduce(gradient)
            worst = max(worst, float((gradient - alone[name]).abs().max() / max(float(alone[name].abs().max()), least)))
    wrong = (logits.detach() - mine(right)) * mine(mask)[..., None]
    return {"logits": float(wrong.abs().max()), "gradients": worst}


def random_routing(replay: r3.Replay, length: int, seed: int) -> RolloutRouting:
    spec = replay.spec
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, length, len(spec.layer_ids), spec.num_experts, generator=generator)
    valid = torch.rand(1, length, generator=generator) < 0.8
    return RolloutRouting(scores.argsort(-1)[..., : spec.top_k], valid, spec.layer_ids, spec.num_experts)


def images_on_one_rank() -> None:
    """A row with an image in its first half, whose pixels the second rank leaves out."""
    model = pictures.build("qwen3_vl_moe")
    attached = ulysses(model, dist.group.WORLD)
    one = pictures.sample(model, 1, 1)
    ids = one.ids[None, :14]
    positions = pictures.rope_index(model, one)[..., :14]
    given = pictures.beside(model, [one]) if attached.rank == 0 else {}
    part = {"input_ids": ids, **pictures.type_ids(model, ids)}
    part = {name: shard(tensor, attached.rank, 2) for name, tensor in part.items()}
    try:
        model(**part, **given, position_ids=shard(positions, attached.rank, 2, dim=2), use_cache=False)
    finally:
        attached.detach()
