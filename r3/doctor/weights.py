"""Checks of a checkpoint's weights without a model: all files present, headers readable, a sample finite."""

import json
import math
import random
import time
from contextlib import ExitStack
from pathlib import Path

from r3.doctor.check import Check
from r3.errors import SHOWN, summary

SAMPLED_BYTES, SAMPLED_S = 1 << 28, 10.0
"""Bounds of what is read for the look at values."""
INDEX = "model.safetensors.index.json"


def weights(path: Path) -> Check:
    """Check the weights in the folder `path`."""
    expected, problems = _expected(path)
    held: dict[str, str] = {}
    dtypes: dict[str, int] = {}
    files = sorted(path.glob("*.safetensors"))
    if not files and not expected:
        return _problem(f"{path} has no safetensors files", "save the model with safe_serialization (the default)")
    problems += [
        f"{name}: the index names it, and it is not there"
        for name in sorted(set(expected.values()) - {f.name for f in files})
    ]
    sample: list[tuple[Path, str]] = []
    for file in files:
        dtype_of = _header(file)
        if isinstance(dtype_of, str):
            problems.append(dtype_of)
            continue
        for name, dtype in dtype_of.items():
            held[name] = file.name
            dtypes[dtype] = dtypes.get(dtype, 0) + 1
            sample.append((file, name))
    lost = [name for name, file in expected.items() if held.get(name) != file and file in {f.name for f in files}]
    problems += [f"{name}: the index says {expected[name]}, which does not hold it" for name in sorted(lost)]
    if problems:
        return _problem(f"{len(problems)} faults:{summary(problems)}", "download or save the checkpoint anew")
    bad, looked = _not_finite(sample)
    if bad:
        return _problem(
            f"not finite: {', '.join(bad[:SHOWN])}", "the checkpoint is broken: take one from before the run diverged"
        )
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    return Check(
        name="weights",
        status="ok",
        detail=f"{len(held)} tensors ({kinds}) in {len(files)} files, complete; {looked} of them looked at: finite",
    )


def _header(file: Path) -> dict[str, str] | str:
    """Dtype by tensor name, or why the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"{file.name}: cannot be read (truncated?): {error}"


def _expected(path: Path) -> tuple[dict[str, str], list[str]]:
    """File by tensor name, from the index if there is one, and problems of the index."""
    if not (path / INDEX).is_file():
        return {}, []
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}, []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{INDEX}: expected an object with weight_map: {type(error).__name__}: {error}"]


def _not_finite(sample: list[tuple[Path, str]]) -> tuple[list[str], int]:
    """Names of non-finite tensors, and the number checked: in random order, within limits of bytes and time."""
    from safetensors import safe_open

    bad: list[str] = []
    looked, size, until = 0, 0, time.monotonic() + SAMPLED_S
    sample = random.Random(0).sample(sample, len(sample))
    with ExitStack() as files:
        # Each file once, since its whole header is read as it is opened.
        opened = {file: files.enter_context(safe_open(file, framework="pt")) for file in {file for file, _ in sample}}
        for file, name in sample:
            if size > SAMPLED_BYTES or time.monotonic() > until:
                break
            part = opened[file].get_slice(name)
            shape = part.get_shape()
            # The first rows of a large tensor: the file is mapped, so that only these are read.
            rows = max(1, (1 << 20) // max(1, math.prod(shape[1:])))
            tensor = part[:rows] if shape else opened[file].get_tensor(name)
            looked, size = looked + 1, size + tensor.nbytes
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                bad.append(name)
    return bad, looked


def _problem(detail: str, remedy: str) -> Check:
    return Check(name="weights", status="problem", detail=detail, remedy=remedy)
