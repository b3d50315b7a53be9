"""Converts names and shapes of a transformers model to those of its checkpoint, which vLLM loads.

transformers 5 fuses some weights when it loads a checkpoint (most of all: a layer's experts, into two 3-D tensors)
and splits them again when it saves. Its own function for that is run here once, on tensors without data that record
their origins. A result that is a view of one weight is sent as a view of it, without a copy; for the rest (weights that
are joined or reordered) the function runs again on the real tensors of that group.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from r3.errors import SyncError, summary
from r3.weight_sync.weights.lazy import LazyWeight, SharedMaterialization

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_OF_ONE_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")

Named = list[tuple[str, LazyWeight]]


class _Traced(Tensor):
    """A tensor without data that records the names of the weights that it was computed from, in `made_of`."""

    made_of: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]  # only a copy could tell
        result = super().__torch_function__(func, types, args, kwargs or {})
        origins = frozenset().union(*(tensor.made_of for tensor in _traced([args, *(kwargs or {}).values()])))
        for tensor in _traced(result):
            tensor.made_of = origins
        return result


def checkpoint_weights(skeleton: Any, live: dict[str, LazyWeight], fused_experts: bool) -> Named:
    """The weights `live` of a transformers model, in the form of its checkpoint.

    Args:
        skeleton: the model's plain, unwrapped form, with its `published_conversions`; may be without data.
        live: by transformers' names.
        fused_experts: leave fused experts as they are where only their split would change their names.
    """
    blank = {name: _blank(name, source) for name, source in live.items()}
    traced = _checkpoint_form(skeleton, blank)
    named: Named = []
    for origins, names in _groups(traced):
        if fused_experts and _is_split_of_experts(origins, names) and _all_views(traced, names, blank[origins[0]]):
            in_order = sorted(names, key=lambda name: traced[name].storage_offset())
            named.append((origins[0], replace(live[origins[0]], parts=tuple(in_order))))
        elif len(origins) == 1 and _all_views(traced, names, blank[origins[0]]):
            named += _views(live[origins[0]], names, traced)
        else:
            named += _converted(skeleton, [live[name] for name in origins], names, traced)
    return named


def published_conversions(skeleton: Any, loaded: list | None) -> list:
    """The conversions between `skeleton` and its published checkpoint.

    transformers loads some weights (Qwen3-VL-MoE's experts) in either of two layouts, the published one and its own,
    and tells them apart by their shape; it always saves its own. Engines read the published one only, which is turned
    against transformers'. A shape does not say which is which where it is square.

    Args:
        skeleton: a plain, unwrapped model; may be without data.
        loaded: what was used to load the model (`_weight_conversions`), or None.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, Transpose

    if loaded is None:
        # As `save_pretrained` does: without a checkpoint, its prefix is unknown.
        every = get_model_conversion_mapping(skeleton, add_legacy=False)
        loaded = [conversion for conversion in every if not isinstance(conversion, PrefixChange)]
    published = copy.deepcopy(loaded)
    for conversion in published:
        for step in getattr(conversion, "operations", ()):
            if isinstance(step, Transpose):
                step.check_dims = False
    return published


def _checkpoint_form(skeleton: Any, named: dict[str, Any]) -> dict[str, Any]:
    # The conversion that `save_pretrained` applies to a state dict before it writes it.
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(skeleton, dict(named))


def _blank(name: str, source: LazyWeight) -> _Traced:
    tensor = torch.empty(source.shape, dtype=source.dtype, device="meta").as_subclass(_Traced)
    tensor.made_of = frozenset([name])
    return tensor


def _traced(value: Any) -> Iterator[_Traced]:
    if isinstance(value, _Traced):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _traced(item)


def _groups(traced: dict[str, _Traced]) -> list[tuple[list[str], list[str]]]:
    """The smallest independent groups: (weights, tensors of the checkpoint that are computed from them)."""
    groups: list[tuple[list[str], list[str]]] = []
    home: dict[str, int] = {}
    for name, tensor in traced.items():
        origins = sorted(tensor.made_of)
        near = sorted({home[origin] for origin in origins if origin in home})
        index = near[0] if near else len(groups)
        if not near:
            groups.append(([], []))
        for other in near[1:]:
            groups[index][0].extend(groups[other][0])
            groups[index][1].extend(groups[other][1])
            groups[other] = ([], [])
        groups[index][0].extend(origin for origin in origins if home.get(origin) is None)
        groups[index][1].append(name)
        home |= dict.fromkeys(groups[index][0], index)
    return [group for group in groups if group[1]]


def _all_views(traced: dict[str, _Traced], names: list[str], of: Tensor) -> bool:
    return all(traced[name].untyped_storage()._cdata == of.untyped_storage()._cdata for name in names)


def _is_split_of_experts(origins: list[str], names: list[str]) -> bool:
    fused = _FUSED.fullmatch(origins[0])
    parts = [_OF_ONE_EXPERT.fullmatch(name) for name in names]
    return fused is not None and len(origins) == 1 and all(p is not None and p[1] == fused[1] for p in parts)


def _views(source: LazyWeight, names: list[str], traced: dict[str, _Traced]) -> Named:
    entry, make_block = source.shape[1:].numel(), source.make_block
    if make_block is None:
        return _cut(source, names, traced, 0)
    named: Named = []
    for block in source.blocks:
        # What is cut out of these entries alone comes together, so that no others are held meanwhile.
        first, last = block.first * entry, block.last * entry
        within = [name for name in names if first <= traced[name].storage_offset() < last]
        if max((_end(traced[name]) for name in within), default=0) > last:
            return _cut(source, names, traced, 0)
        named += _cut(replace(source, make=partial(make_block, block), holders=block.holders), within, traced, first)
    return named


def _end(view: Tensor) -> int:
    """One past the last number of a view in its storage."""
    reach: int = sum(stride * (size - 1) for stride, size in zip(view.stride(), view.shape, strict=True))
    return int(view.storage_offset()) + reach + 1


def _cut(source: LazyWeight, names: list[str], traced: dict[str, _Traced], before: int) -> Named:
    """Views of what `source` makes, which begins after `before` numbers of the weight."""
    cuts = [(traced[name].shape, traced[name].stride(), traced[name].storage_offset()) for name in names]

    def make() -> list[Tensor]:
        tensor = source.make().contiguous()
        at = tensor.storage_offset() - before
        return [tensor.as_strided(shape, stride, at + offset) for shape, stride, offset in cuts]

    return _taken(make, names, traced, [source], live=source.live)


def _converted(skeleton: Any, sources: list[LazyWeight], names: list[str], traced: dict[str, _Traced]) -> Named:
    def make() -> list[Tensor]:
        converted = _checkpoint_form(skeleton, {source.name: source.make() for source in sources})
        problems = [f"{name}: not made" for name in names if name not in converted]
        problems += [f"{name}: made, but not from all weights together" for name in converted if name not in names]
        if problems:
            raise SyncError(f"transformers' conversion of {len(sources)} weights depends on others:{summary(problems)}")
        return [converted[name] for name in names]

    return _taken(make, names, traced, sources, live=False)


def _taken(
    make: Callable[[], list[Tensor]],
    names: list[str],
    traced: dict[str, _Traced],
    sources: list[LazyWeight],
    *,
    live: bool,
) -> Named:
    """The weights `names` that `make` makes at once, of `sources`."""
    taken = SharedMaterialization(make)
    together = (taken, *(item for source in sources for item in source.together))
    return [
        (
            name,
            LazyWeight(
                name=name,
                shape=torch.Size(traced[name].shape),
                dtype=traced[name].dtype,
                # No copy if the view is contiguous, as for experts.
                make=lambda index=index: taken.take(index).contiguous(),
                keep_dtype=all(source.keep_dtype for source in sources),
                live=live and traced[name].is_contiguous(),
                together=together,
                holders=sources[0].holders if len(sources) == 1 else (),
            ),
        )
        for index, name in enumerate(names)
    ]
