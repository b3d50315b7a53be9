"""Checks of the installed packages: Python, torch, transformers, and optional packages."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial

from r3.doctor.check import Check, brief, guarded
from r3.releases import TESTED, unseen

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
    return release_check("python", ".".join(map(str, sys.version_info[:3])), f"use Python {TESTED['python'].first}")


def _package(name: str) -> Check:
    remedy = f"pip install '{name}>={TESTED[name].first}'"
    try:
        importlib.import_module(name)
        version = importlib.metadata.version(name)
    except ImportError as error:
        return Check(name=name, status="problem", detail=brief(error), remedy=remedy)
    return release_check(name, version, remedy)


def release_check(name: str, version: str, remedy: str) -> Check:
    """Check a version of Python, torch or transformers: too old is a problem, one that r3 has not seen a warning."""
    from packaging.version import Version

    tested = TESTED[name]
    if Version(version) < Version(tested.first):
        return Check(name=name, status="problem", detail=version, remedy=remedy)
    if tested.has_seen(version):
        return Check(name=name, status="ok", detail=version)
    detail = unseen(
        name,
        version,
        f"{tested.first} to below {tested.beyond}",
        checked="it is imported; `attach` refuses a model whose routers it does not find or cannot prove",
        unknown="what else has changed",
    )
    return Check(name=name, status="warning", detail=detail, remedy="run `r3 doctor --model PATH`, which proves replay")


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
    "torch": partial(_package, "torch"),
    "torchvision": _torchvision,
    "transformers": partial(_package, "transformers"),
}
