"""Rollouts in one safetensors file: nothing is pickled, and everything that is read is checked.

Ragged parts are concatenated, with their lengths in a tensor of their own; routing is in the wire form, rollout after
rollout. The names are those of `Rollout`. Everything that is no tensor is JSON in the file's metadata.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r3.capture.rollout import Rollout, Rollouts
from r3.capture.settings import SamplingSettings
from r3.errors import CaptureError, RoutingError, summary
from r3.routing import RolloutRouting, RoutingSpec
from r3.sampling_mask import SamplingMask

FORMAT, VERSION = "r3.rollouts", "2"
_DTYPES = {
    "prompt_lengths": torch.int64,
    "response_lengths": torch.int64,
    "prompt_ids": torch.int64,
    "token_ids": torch.int64,
    "response_mask": torch.uint8,
    "logprobs": torch.float32,
    "finish_reason": torch.int64,  # place among the reasons; -1 for None
    "prompt_index": torch.int64,
    "version_counts": torch.int64,
    "weight_versions": torch.int64,
    "row_version_lengths": torch.int64,  # -1 for None
    "row_versions": torch.int32,
    "routing_bytes": torch.int64,  # -1 for None
    "routing": torch.uint8,
    "mask_lengths": torch.int64,  # -1 for None
    "mask_sizes": torch.int64,
    "mask_ids": torch.int32,
}
_PER_ROLLOUT = (
    "prompt_lengths",
    "response_lengths",
    "finish_reason",
    "prompt_index",
    "version_counts",
    "row_version_lengths",
    "routing_bytes",
    "mask_lengths",
)


def save_rollouts(
    rollouts: Rollouts, path: str | os.PathLike[str], *, settings: SamplingSettings | Mapping[str, Any] | None = None
) -> Path:
    """Write `rollouts` to one file, atomically. `load_rollouts` reads them back.

    Args:
        rollouts: of any lengths, with or without routing and versions.
        path: of the file; one that is there is replaced.
        settings: under which they were sampled, as far as known: `SamplingSettings.of(config)`, or a mapping with its
            names.

    Returns:
        The path.

    Raises:
        CaptureError: settings of other names or types, rollouts that contradict themselves, or a file that cannot be
            written (nothing is left of it).

    Example:
        >>> sampled = {"response_mask": torch.tensor([True]), "logprobs": torch.tensor([-0.5])}
        >>> rollout = Rollout(prompt_ids=[1, 2], token_ids=[3], routing=None, finish_reason="stop", **sampled)
        >>> path = save_rollouts(Rollouts([rollout], None), "rollouts.safetensors")
        >>> load_rollouts(path).items[0].token_ids
        [3]
    """
    from safetensors.torch import save_file

    if not isinstance(settings, SamplingSettings):
        settings = SamplingSettings.from_mapping(settings or {})
    file = Path(path)
    reasons = sorted({item.finish_reason for item in rollouts.items if item.finish_reason is not None})
    spec = rollouts.spec
    content = {
        "settings": settings.to_dict(),
        "finish_reasons": reasons,
        "spec": None
        if spec is None
        else {name: list(v) if isinstance(v, tuple) else v for name, v in vars(spec).items()},
        "failed": {str(place): problem for place, problem in rollouts.failed.items()},
        "mixed_versions": rollouts.mixed_versions,
    }
    tensors = _tensors(rollouts, {reason: place for place, reason in enumerate(reasons)})
    metadata = {"format": FORMAT, "version": VERSION, "content": json.dumps(content)}
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, file)
    except Exception as error:  # of the disk, or safetensors' own
        raise CaptureError(f"{file}: rollouts could not be written: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return file


def load_rollouts(path: str | os.PathLike[str]) -> Rollouts:
    """The rollouts of a file that `save_rollouts` wrote, fully checked.

    Memory is bounded by a small multiple of the file's size, whatever the file claims.

    Raises:
        CaptureError: no such file, another kind of file, truncated or damaged, a newer format, or content that
            contradicts itself: says what, of which rollout.
    """
    file = Path(path)
    with _naming_file(file):
        tensors, content = _read(file)
        spec = _spec(content.get("spec"))
        return Rollouts(
            list(_items(tensors, content, spec)),
            spec,
            {int(place): str(problem) for place, problem in dict(content["failed"]).items()},
            _integer(content, "mixed_versions"),
        )


def saved_settings(path: str | os.PathLike[str]) -> SamplingSettings:
    """The settings in a file that `save_rollouts` wrote.

    Raises:
        CaptureError: as `load_rollouts`, of what is read.
    """
    file = Path(path)
    with _naming_file(file):
        return SamplingSettings.from_mapping(dict(_read(file, tensors=False)[1]["settings"]))


@contextlib.contextmanager
def _naming_file(file: Path) -> Iterator[None]:
    """Context in which errors of hostile content name the file."""
    try:
        yield
    except CaptureError as error:
        raise CaptureError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, RoutingError) as error:
        raise CaptureError(f"{file}: damaged: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _naming_rollout(where: str) -> Iterator[None]:
    """Context in which errors of inconsistent parts name the rollout."""
    try:
        yield
    except CaptureError as error:
        raise CaptureError(f"{where}: {error}") from error


def _tensors(rollouts: Rollouts, reasons: dict[str, int]) -> dict[str, Tensor]:
    items = rollouts.items
    for place, item in enumerate(items):
        _require_consistent(f"rollout {place}", item, rollouts.spec)
    wires = [b"" if item.routing is None else item.routing.to_bytes() for item in items]
    rows = [item.row_versions for item in items]
    lists = {
        "prompt_lengths": [len(item.prompt_ids) for item in items],
        "response_lengths": [len(item.token_ids) for item in items],
        "prompt_ids": [token for item in items for token in item.prompt_ids],
        "token_ids": [token for item in items for token in item.token_ids],
        "finish_reason": [-1 if item.finish_reason is None else reasons[item.finish_reason] for item in items],
        "prompt_index": [item.prompt_index for item in items],
        "version_counts": [len(item.weight_versions) for item in items],
        "weight_versions": [version for item in items for version in item.weight_versions],
        "row_version_lengths": [-1 if row is None else len(row) for row in rows],
        "mask_lengths": [-1 if item.sampling_mask is None else len(item) for item in items],
        "routing_bytes": [-1 if item.routing is None else len(wire) for item, wire in zip(items, wires, strict=True)],
    }
    parts = {
        "response_mask": [item.response_mask for item in items],
        "logprobs": [item.logprobs for item in items],
        "row_versions": [row for row in rows if row is not None],
        "mask_sizes": [item.sampling_mask.sizes for item in items if item.sampling_mask is not None],
        "mask_ids": [item.sampling_mask.token_ids for item in items if item.sampling_mask is not None],
    }
    wire = bytearray(b"".join(wires))
    tensors = {name: torch.tensor(values, dtype=_DTYPES[name]) for name, values in lists.items()}
    tensors |= {name: _joined(values, _DTYPES[name]) for name, values in parts.items()}
    tensors["routing"] = torch.frombuffer(wire, dtype=torch.uint8) if wire else torch.empty(0, dtype=torch.uint8)
    return tensors


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.detach().to("cpu", dtype) for part in parts]) if parts else torch.empty(0, dtype=dtype)


def _read(file: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CaptureError("expected a file of rollouts, found none")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CaptureError(
                    f"expected rollouts that r3 saved, got a file of format {metadata.get('format')!r:.40}"
                )
            if metadata.get("version") != VERSION:
                raise CaptureError(
                    f"expected format version {VERSION}, got {metadata.get('version')!r:.40}: written by another r3"
                )
            names = set(opened.keys())
            if names != _DTYPES.keys():
                raise CaptureError(
                    f"expected the tensors {', '.join(sorted(_DTYPES))}; missing or unknown: "
                    f"{', '.join(sorted(names ^ _DTYPES.keys()))[:400]}"
                )
            # Copies, since reading a mapped file that another process truncates would kill this one.
            loaded = {name: opened.get_tensor(name).clone() for name in names} if tensors else {}
    except SafetensorError as error:
        raise CaptureError(f"truncated, or no safetensors file: {error}") from error
    except OSError as error:
        raise CaptureError(f"cannot be read: {error}") from error
    content = json.loads(metadata["content"])
    if not isinstance(content, dict):
        raise CaptureError(f"content: expected an object, got {type(content).__name__}")
    problems = [
        f"{name}: expected {_DTYPES[name]} [n], got {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in loaded.items()
        if tensor.dtype != _DTYPES[name] or tensor.dim() != 1
    ]
    if problems:
        raise CaptureError(f"tensors:{summary(problems)}")
    return loaded, content


def _items(tensors: dict[str, Tensor], content: dict[str, Any], spec: RoutingSpec | None) -> Iterator[Rollout]:
    counts = {name: tensors[name].tolist() for name in _PER_ROLLOUT}
    number = len(counts["prompt_lengths"])
    odd = [f"{name}: {len(values)}" for name, values in counts.items() if len(values) != number]
    if odd:
        raise CaptureError(f"expected one entry for each of {number} rollouts, got{summary(odd)}")
    reasons = [str(reason) for reason in content["finish_reasons"]]
    prompts = _split("prompt_ids", tensors, counts["prompt_lengths"])
    responses = _split("token_ids", tensors, counts["response_lengths"])
    masks = _split("response_mask", tensors, counts["response_lengths"])
    logprobs = _split("logprobs", tensors, counts["response_lengths"])
    versions = _split("weight_versions", tensors, counts["version_counts"])
    rows = _split("row_versions", tensors, counts["row_version_lengths"], absent=-1)
    wires = _split("routing", tensors, counts["routing_bytes"], absent=-1)
    sizes = _split("mask_sizes", tensors, counts["mask_lengths"], absent=-1)
    sets = _split("mask_ids", tensors, [int(each.sum()) for each in sizes])
    for i in range(number):
        where, reason = f"rollout {i}", counts["finish_reason"][i]
        if not -1 <= reason < len(reasons):
            raise CaptureError(f"{where}: finish reason: expected -1 to {len(reasons) - 1}, got {reason}")
        if len(masks[i]) and int(masks[i].max()) > 1:
            raise CaptureError(f"{where}: response_mask: expected 0 and 1, got {int(masks[i].max())}")
        with _naming_rollout(where):
            item = Rollout(
                prompt_ids=prompts[i].tolist(),
                token_ids=responses[i].tolist(),
                response_mask=masks[i].bool(),
                logprobs=logprobs[i].clone(),
                routing=_routing(wires[i], len(prompts[i]) + len(responses[i]), spec, counts["routing_bytes"][i]),
                finish_reason=None if reason == -1 else reasons[reason],
                prompt_index=counts["prompt_index"][i],
                weight_versions=tuple(versions[i].tolist()),
                row_versions=None if counts["row_version_lengths"][i] == -1 else rows[i].clone(),
                sampling_mask=None
                if counts["mask_lengths"][i] == -1
                else _sampling_mask(sizes[i], sets[i], responses[i].tolist(), len(prompts[i])),
            )
        _require_consistent(where, item, spec)
        yield item


def _split(name: str, tensors: dict[str, Tensor], lengths: list[int], *, absent: int = 0) -> list[Tensor]:
    """The parts of a ragged tensor; a length of `absent` stands for none."""
    wrong = [f"rollout {i}: {length}" for i, length in enumerate(lengths) if length < absent]
    sizes = [max(length, 0) for length in lengths]
    total = len(tensors[name])
    if wrong or sum(sizes) != total:
        raise CaptureError(f"{name}: expected lengths that add up to {total}, got {sum(sizes)}{summary(wrong)}")
    return [tensors[name][start:end] for start, end in pairwise(accumulate(sizes, initial=0))]


def _routing(wire: Tensor, tokens: int, spec: RoutingSpec | None, stored: int) -> RolloutRouting | None:
    if stored == -1:
        return None
    if spec is None:
        raise CaptureError("routing without a spec")
    # The claimed size of compressed ids or validity runs is bounded by what the rollout needs.
    limit = (tokens + 1) * (len(spec.layer_ids) * (spec.top_k * 4 + 1) + 1)
    try:
        return RolloutRouting.from_bytes(wire.clone().numpy().tobytes(), max_bytes=limit)
    except RoutingError as error:
        raise CaptureError(f"routing: {error}") from error


def _sampling_mask(sizes: Tensor, sets: Tensor, sampled: list[int], prompt: int) -> SamplingMask:
    if len(sizes) != prompt + len(sampled) or int(sizes.min()) < 0 or sizes[:prompt].any():
        raise CaptureError("sampling mask: expected a number of ids of each token, 0 in the prompt")
    drawn = sizes[prompt:] > 0
    # Tokens between the turns of a conversation have no set.
    SamplingMask.of(sizes[prompt:][drawn], sets, [token for token, own in zip(sampled, drawn, strict=True) if own])
    return SamplingMask(sizes.clone(), sets.clone())


def _require_consistent(where: str, item: Rollout, spec: RoutingSpec | None) -> None:
    problems: list[str] = []
    if item.logprobs.dtype != torch.float32:
        problems.append(f"logprobs: expected torch.float32, got {item.logprobs.dtype}")
    if item.routing is not None and spec is None:
        problems.append("routing: expected none without a spec")
    elif item.routing is not None and spec is not None:
        expected = (1, len(item), len(spec.layer_ids), spec.top_k), spec.layer_ids, spec.num_experts
        got = item.routing.shape, item.routing.layer_ids, item.routing.num_experts
        if got != expected:
            problems.append(f"routing: expected (shape, layers, experts) {expected}, got {got}")
    if problems:
        raise CaptureError(f"{where}:{summary(problems)}")


def _spec(saved: Any) -> RoutingSpec | None:
    if saved is None:
        return None
    names = ("num_layers", "num_experts", "top_k")
    layers = {name: tuple(_integer({name: v}, name) for v in saved[name]) for name in ("layer_ids", "table_layers")}
    numbers = {name: _integer(saved, name) for name in names}
    if set(saved) != {*layers, *numbers} or any(not 0 < value < 1 << 31 for value in numbers.values()):
        raise CaptureError(f"spec: expected positive {', '.join(names)} and lists of layers, got {str(saved)[:200]}")
    return RoutingSpec(
        layer_ids=layers["layer_ids"],
        num_layers=numbers["num_layers"],
        num_experts=numbers["num_experts"],
        top_k=numbers["top_k"],
        table_layers=layers["table_layers"],
    )


def _integer(saved: Mapping[str, Any], name: str) -> int:
    value = saved[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise CaptureError(f"{name}: expected an integer, got {value!r:.80}")
    return value
