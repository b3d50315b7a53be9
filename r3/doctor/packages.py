"""Checks of the installed packages: Python, torch, transformers, and optional packages."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial

from r3.doctor.check import Check, brief, guarded

PYTHON = ((3, 10), (3, 13))
TORCH, TRANSFORMERS = "2.9", "5.9"
OPTIONAL = {
    "accelerate": ("accelerate", "training on several GPUs"),
    "flash-attn": ("flash_attn", "its attention kernels"),
    "matplotlib": ("matplotlib", "reports"),
    "numba": ("numba", "digests and checks of rows several times as fast on the CPU"),
    "peft": ("peft", "adapters"),
    "pybase64": ("pybase64", "captured rows decoded several times as fast"),
    "reasoning-gym": ("reasoning_gym", "the demo"),
    "tensorboard": ("tensorboard", "a sink"),
    "trackio": ("trackio", "a sink"),
    "trl": ("trl", "its trainer"),
    "wandb": ("wandb", "a sink"),
}
"""Package -> (module, what it is for). Not needed, but one that is there must be importable."""


def _python() -> Check:
    version = sys.version_info[:2]
    within = PYTHON[0] <= version <= PYTHON[1]
    return Check(
        name="python",
        status="ok" if within else "problem",
        detail=".".join(map(str, sys.version_info[:3])),
        remedy="" if within else "use Python 3.10 to 3.13",
    )


def _package(name: str, least: str) -> Check:
    from packaging.version import Version

    try:
        importlib.import_module(name)
        version = importlib.metadata.version(name)
    except ImportError as error:
        return Check(name=name, status="problem", detail=brief(error), remedy=f"pip install '{name}>={least}'")
    enough = Version(version) >= Version(least)
    return Check(
        name=name,
        status="ok" if enough else "problem",
        detail=version,
        remedy="" if enough else f"pip install '{name}>={least}'",
    )


def _torchvision() -> Check | None:
    """Check torchvision's build: a CUDA build with a CPU build of torch breaks imports of transformers."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError: operator torchvision::nms does not exist
        return Check(
            name="torchvision",
            status="problem",
            detail=f"cannot be imported: {brief(error)}. It is of another build than torch",
            remedy="pip uninstall torchvision torchaudio torchcodec: nothing here needs them",
        )
    return Check(name="torchvision", status="ok", detail=importlib.metadata.version("torchvision"))


def optional_packages() -> Iterator[Check]:
    """One check for each installed optional package, and one line for those that are absent."""
    absent = []
    for package, (module, purpose) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            absent.append(f"{package} ({purpose})")
        else:
            yield from guarded(f"optional {package}", partial(_optional, package, module))
    if absent:
        yield Check(name="optional packages", status="ok", detail=f"not installed: {', '.join(absent)}")


def _optional(package: str, module: str) -> Check:
    try:
        importlib.import_module(module)
    except Exception as error:  # of another build than torch: undefined symbols and the like
        return Check(
            name=f"optional {package}",
            status="problem",
            detail=f"installed, and cannot be imported: {type(error).__name__}: {brief(error)}",
            remedy=f"pip uninstall {package}, or install a build for this torch and Python",
        )
    return Check(name=f"optional {package}", status="ok", detail=importlib.metadata.version(package))


ENVIRONMENT: dict[str, Callable[[], Check | None]] = {
    "python": _python,
    "torch": partial(_package, "torch", TORCH),
    "torchvision": _torchvision,
    "transformers": partial(_package, "transformers", TRANSFORMERS),
}
