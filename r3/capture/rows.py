"""From vLLM's arrays of expert ids, in memory or over HTTP, to checked routing."""

import binascii
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from r3.errors import CaptureError
from r3.routing import RolloutRouting, RoutingSpec, check_rows, compact_dtype
from r3.routing.checks import MANY_IDS, well_formed
from r3.routing.types import trusted
from r3.routing.validity import Counts

_MAX_HEADER_BYTES = 1024  # numpy writes 128 for an integer array of 3 dimensions


def decode_npy(text: str, *, max_bytes: int) -> np.ndarray:
    """The integer array `[rows, decoder layers, K]` that vLLM's server sent as base64 of a `.npy` file.

    Args:
        text: base64, with padding and without line breaks.
        max_bytes: the most that the file may hold, header included; looked at before anything is decoded.

    Returns:
        A view of the decoded bytes, which cannot be written to. Its content is not checked: see `checked_rows`.

    Raises:
        CaptureError: not base64, not a `.npy` of a native integer array of 3 dimensions in C order, pickled objects,
            bytes missing or left over, or more than `max_bytes`.
    """
    # Up to two characters of the last four are padding.
    if len(text) // 4 * 3 - 2 > max_bytes:
        raise CaptureError(f"routing: expected at most {max_bytes} bytes, got {len(text)} characters of base64")
    try:
        data = _base64_decoder()(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CaptureError(f"routing: expected base64, got {text[:24]!r}...: {error}") from error
    if len(data) > max_bytes:
        raise CaptureError(f"routing: expected at most {max_bytes} bytes, got {len(data)}")
    shape, dtype, start = _npy_header(data)
    if dtype.hasobject or dtype.kind not in "iu" or not dtype.isnative or len(shape) != 3 or min(shape) < 0:
        raise CaptureError(
            f"routing: expected a .npy of native integers [rows, decoder layers, top_k], got {dtype.str} {shape}"
        )
    expected = shape[0] * shape[1] * shape[2] * dtype.itemsize
    if expected != len(data) - start:
        raise CaptureError(f"routing: expected {expected} bytes for {dtype} {shape}, got {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@cache
def _base64_decoder() -> Callable[..., bytes]:
    """The decoder of pybase64 (a dependency of vLLM, about seven times as fast), or of the standard library."""
    try:
        from pybase64 import b64decode
    except ImportError:
        from base64 import b64decode
    return b64decode


def _npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and the offset at which the content starts."""
    file = io.BytesIO(data[:_MAX_HEADER_BYTES])  # a longer header ends early
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = _HEADERS[version](file)
    # A header is a Python literal. numpy does not document what a hostile one raises.
    except Exception as error:
        raise CaptureError(f"routing: expected a .npy file, got {data[:16]!r}...: {error}") from error
    if fortran:
        raise CaptureError(f"routing: expected a .npy in C order, got Fortran order {shape}")
    return shape, dtype, file.tell()


# Later versions are for field names in other alphabets.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def row_array(rows: Any) -> np.ndarray | None:
    """Any array-like of integers as a numpy array; None for None. `checked_rows` checks the content.

    Raises:
        CaptureError: what cannot be read as an array.
    """
    if rows is None or isinstance(rows, np.ndarray):
        return rows
    try:
        if isinstance(rows, torch.Tensor):
            return rows.detach().cpu().numpy()
        return np.asarray(rows)
    except Exception as error:  # an array-like of another library may raise anything
        raise CaptureError(
            f"routing: expected an array of integers [rows, decoder layers, top_k], got {type(rows).__name__}: {error}"
        ) from error


def checked_rows(
    routed_experts: np.ndarray | None,
    spec: RoutingSpec,
    *,
    tokens: int,
    start: int = 0,
    complete: bool = True,
    weight_version: int | None = None,
) -> RolloutRouting:
    """`[1, tokens, L, K]` of the layers that have a router, from vLLM's `[rows, decoder layers, K]`.

    Row r of the array belongs to token `start` + r. Tokens without a row, as the last one, are not valid, and neither
    are rows of -1, in the layers that have it.

    Args:
        routed_experts: what the engine returned.
        spec: the routing that the trainer's model can replay.
        tokens: P + G.
        start: `SamplingParams.routed_experts_prompt_start` of the request.
        complete: rows for all tokens from `start` to the last but one are expected; False admits fewer, as of a
            request that was aborted.
        weight_version: of the engine when it sampled.

    Raises:
        CaptureError: what is wrong with the array, at which position and decoder layer.
    """
    expected = (max(0, tokens - 1 - start), spec.num_layers, spec.top_k)
    if routed_experts is None:
        if complete:
            raise CaptureError(
                "no routing: the engine does not return it. Start it with enable_return_routed_experts=True "
                "(r3.capture.engine_kwargs does)"
            )
        routed_experts = np.zeros((0, *expected[1:]), np.uint8)
    fits = routed_experts.shape == expected or (
        not complete and routed_experts.shape[1:] == expected[1:] and len(routed_experts) < expected[0]
    )
    if not fits or not np.issubdtype(routed_experts.dtype, np.integer):
        raise CaptureError(
            f"expected integer routing [prompt + generated - 1 - prompt_start, decoder layers, top_k] = {expected}"
            f"{'' if complete else ' or fewer rows'}, got {routed_experts.dtype} {routed_experts.shape}"
        )
    rows = len(routed_experts)
    compact = compact_dtype(spec.num_experts)
    expert_ids = torch.empty(1, tokens, len(spec.layer_ids), spec.top_k, dtype=compact)
    expert_ids[:, :start] = 0
    expert_ids[:, start + rows :] = 0
    captured = expert_ids[0, start : start + rows].numpy()
    right = _take_layers(captured, routed_experts, spec) and well_formed(
        captured.reshape(-1, spec.top_k), spec.num_experts, many=captured.size >= MANY_IDS
    )
    # A layer of zeros repeats id 0, except with one slot: then it looks like a captured layer.
    blank = (0, -1) if spec.top_k > 1 else (-1,)
    never = [] if right or not rows else [i for i in spec.layer_ids if _all_are(routed_experts[:, i], blank)]
    if never:
        raise CaptureError(
            f"decoder layers {never} were never captured (all expert ids are 0, or -1). vLLM's CPU build 0.30 does "
            "this when it compiles: use enforce_eager=True; so do monolithic MoE kernels"
        )
    dense = sorted(set(range(spec.num_layers)) - {*spec.layer_ids, *spec.table_layers})
    routed = [layer for layer in dense if routed_experts[:, layer].any()]
    if routed:
        raise CaptureError(f"decoder layers {routed} are routed in the engine, but have no router in the trainer")
    valid = torch.zeros(1, tokens, dtype=torch.bool)
    valid[:, start : start + rows] = True
    if right:
        counts = Counts(rows, rows * len(spec.layer_ids))
        return trusted(expert_ids, valid, spec.layer_ids, spec.num_experts, weight_version, counts)
    # int64 holds the values of every dtype; torch cannot sort all dtypes.
    wide = torch.zeros(expert_ids.shape, dtype=torch.int64)
    wide[0, start : start + rows] = torch.from_numpy(routed_experts[:, list(spec.layer_ids)].astype(np.int64))
    signed = routed_experts.dtype.kind == "i"  # the largest id of uint64 is -1 here
    validity = valid[..., None] & ~((wide == -1).all(-1) & signed)
    check_rows(wide, validity, spec.layer_ids, spec.num_experts, CaptureError)
    return RolloutRouting(wide, validity, spec.layer_ids, spec.num_experts, weight_version)


def _all_are(ids: np.ndarray, values: tuple[int, ...]) -> bool:
    """Whether all ids are equal, and one of `values`."""
    return ids.min() == ids.max() and int(ids.min()) in values


def _take_layers(target: np.ndarray, routed_experts: np.ndarray, spec: RoutingSpec) -> bool:
    """Copy the columns of the layers that have a router; False if an id would change its value in the target's dtype.

    A run of neighbouring layers at a time, since picked columns are slow; in one thread, since torch's own would wait
    for each other at the end of each small copy.
    """
    layers = spec.layer_ids
    ends = [at for at in range(1, len(layers)) if layers[at] != layers[at - 1] + 1]
    for at, end in zip([0, *ends], [*ends, len(layers)], strict=True):
        columns = routed_experts[:, layers[at] : layers[at] + end - at]
        changes = columns.dtype != target.dtype and columns.size
        if changes and (int(columns.min()) < 0 or int(columns.max()) >= spec.num_experts):
            return False
        np.copyto(target[:, at:end], columns, casting="unsafe")
    return True
