"""What a benchmark says about where it ran, and how it sums up samples."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

import torch


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine(device: torch.device) -> dict[str, str | None]:
    """Hardware, versions and commit of this run."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    return {"hardware": name, "commit": _commit()} | {p: _version(p) for p in ("torch", "transformers", "triton")}


def spread(samples: list[float]) -> dict[str, float]:
    """Median and the first and last decile."""
    deciles = quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {"median": round(median(samples), 4), "p10": round(deciles[0], 4), "p90": round(deciles[-1], 4)}
