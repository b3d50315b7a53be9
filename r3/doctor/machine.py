"""Checks of the machine: GPUs and driver, NCCL, shared memory, free disk, and harmful environment variables."""

import ctypes
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from r3.config import R3Config, variables
from r3.doctor.check import Check, guarded

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 1 << 30
"""Containers have 64 MiB by default; NCCL, vLLM's workers and chunks of a sync want more."""
LEAST_DISK_BYTES = 1 << 30
BFLOAT16_CAPABILITY = (8, 0)

HARMFUL = {
    "PYTHONDONTWRITEBYTECODE": "every process of an engine compiles all modules anew: 15 s more at each start",
    "CUDA_LAUNCH_BLOCKING": "each kernel is waited for: training is several times slower",
    "NCCL_P2P_DISABLE": "GPUs do not copy to each other directly: syncs and collectives are much slower",
    "NCCL_SHM_DISABLE": "ranks of one host talk over the network",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "vLLM unpickles what its control routes get; nothing here needs it",
}
"""Variables that hurt wherever they are set to anything but 0 or nothing."""
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def machine_checks(config: R3Config) -> Iterator[Check]:
    """Run all checks of the machine."""
    yield from guarded("gpus", _gpus)
    yield from guarded("nccl", _nccl)
    yield from guarded("shared memory", partial(_shared_memory, config))
    yield from guarded("disk", partial(_disk, config))
    yield from guarded("environment variables", partial(_variables, variables((*HARMFUL, *INTERFACES))))


def _gpus() -> Check | None:
    import torch

    nodes = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    if torch.version.cuda is None:
        if nodes:
            return Check(
                name="gpus",
                status="warning",
                detail=f"{len(nodes)} NVIDIA GPUs, and torch {torch.__version__} is a build without CUDA",
                remedy="install a CUDA build of torch, unless the CPU is meant",
            )
        return Check(name="gpus", status="ok", detail="none; torch is a build without CUDA")
    versions = f"torch for CUDA {torch.version.cuda}, {_driver()}"
    if not torch.cuda.is_available():
        return Check(
            name="gpus",
            status="problem" if nodes else "warning",
            detail=f"none that torch can use ({len(nodes)} in /dev); {versions}",
            remedy="a driver at least as new as torch's CUDA, and CUDA_VISIBLE_DEVICES that names a GPU; a container "
            "has to be started with its GPUs",
        )
    names, weak, full = [], [], []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        memory = f"{total / 2**30:.0f} GiB, {free / 2**30:.0f} free"
        names.append(f"{properties.name} ({memory}, capability {properties.major}.{properties.minor})")
        if capability < BFLOAT16_CAPABILITY:
            weak.append(str(index))
        if free < total / 2:
            full.append(str(index))
    detail = f"{len(names)}: {', '.join(names)}; {versions}"
    if weak:
        detail += f"; GPU {', '.join(weak)} has no bfloat16 (below capability 8.0)"
    if full:
        detail += f"; more than half of the memory of GPU {', '.join(full)} is taken"
    remedy = (
        "set the dtypes to float16" if weak else "end what holds it, or lower gpu_memory_utilization" if full else ""
    )
    return Check(name="gpus", status="warning" if weak or full else "ok", detail=detail, remedy=remedy)


def _driver() -> str:
    """The newest CUDA version that the driver reports to support."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "no driver"
    number = version.value
    return "a driver that fails" if failed else f"driver for CUDA {number // 1000}.{number % 1000 // 10}"


def _nccl() -> Check | None:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return None
    if not dist.is_available() or not dist.is_nccl_available():
        return Check(
            name="nccl",
            status="problem",
            detail="this torch has no NCCL: no training on several GPUs, and no transport nccl",
            remedy="install a CUDA build of torch for Linux",
        )
    return Check(name="nccl", status="ok", detail=".".join(map(str, torch.cuda.nccl.version())))


def _shared_memory(config: R3Config) -> Check:
    if not SHARED_MEMORY.is_dir():
        return Check(
            name="shared memory",
            status="warning",
            detail=f"no {SHARED_MEMORY}: chunks of the transport `files` go to {tempfile.gettempdir()}",
            remedy="mount one, or start the container with --shm-size=16g",
        )
    usage, sync = shutil.disk_usage(SHARED_MEMORY), config.generator.inference_engine.weight_sync
    # A chunk is written while the one before it is loaded.
    needed = int(2 * sync.chunk_mib * 2**20) if sync.transport == "files" else 0
    detail = f"{SHARED_MEMORY} has {_gib(usage.total)} GiB, {_gib(usage.free)} free"
    remedy = "start the container with --shm-size=16g (or --ipc=host), or mount a larger one"
    if usage.free < needed:
        return Check(
            name="shared memory",
            status="problem",
            detail=f"{detail}: two chunks of {sync.chunk_mib:g} MiB (transport files) do not fit",
            remedy=f"{remedy}; or lower generator.inference_engine.weight_sync.chunk_mib",
        )
    if usage.total < LEAST_SHARED_BYTES:
        return Check(
            name="shared memory",
            status="warning",
            detail=f"{detail}: NCCL and vLLM's workers run out of it",
            remedy=remedy,
        )
    return Check(name="shared memory", status="ok", detail=detail)


def _disk(config: R3Config) -> Check:
    """Check the disks of the run folder and of temporary files."""
    output = Path(config.trainer.output_dir or "runs").absolute()
    folders = {str(next(path for path in (output, *output.parents) if path.exists())), tempfile.gettempdir()}
    free = {folder: shutil.disk_usage(folder).free for folder in sorted(folders)}
    detail = ", ".join(f"{folder}: {_gib(space)} GiB free" for folder, space in free.items())
    low = min(free.values()) < LEAST_DISK_BYTES
    return Check(
        name="disk",
        status="warning" if low else "ok",
        detail=detail,
        remedy="free some, or set trainer.output_dir (run folders) and TMPDIR (temporary files) to other disks"
        if low
        else "",
    )


def _variables(environment: Mapping[str, str]) -> Check:
    hurting = [
        f"{name}={environment[name]}: {why}"
        for name, why in HARMFUL.items()
        if environment.get(name, "0") not in ("", "0")
    ]
    known = [name for _, name in socket.if_nameindex()]
    missing = [
        f"{name}={environment[name]}: this host has {', '.join(known)}"
        for name in INTERFACES
        if _absent(environment.get(name), known)
    ]
    if missing:
        return Check(
            name="environment variables",
            status="problem",
            detail="; ".join([*missing, *hurting]),
            remedy="name an interface of this host, or unset the variable",
        )
    names = [line.partition("=")[0] for line in hurting]
    return Check(
        name="environment variables",
        status="warning" if hurting else "ok",
        detail="; ".join(hurting) or "none that is known to hurt",
        remedy=f"unset {' '.join(names)}" if hurting else "",
    )


def _absent(interfaces: str | None, present: list[str]) -> bool:
    """Whether no interface matches NCCL's list: prefixes, `=` for exact names, `^` for all others."""
    if not interfaces or interfaces.startswith("^"):
        return False
    exact = interfaces.startswith("=")
    wanted = interfaces.lstrip("=").split(",")
    return not any(name == want or (not exact and name.startswith(want)) for name in present for want in wanted)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
