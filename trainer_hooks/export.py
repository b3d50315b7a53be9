"""The policy as a Hugging Face checkpoint, under the names that its own checkpoint has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from r3.weight_sync.weights.lazy import LazyWeight, gathered
from trainer_hooks.policy import Policy

SHARD_BYTES = 4 * 2**30


def export_policy(policy: Policy, source: str, path: Path) -> None:
    """Write the policy to the folder `path`: weights, config and tokenizer. Every rank calls it; the first one writes.

    Weights have the dtype of the checkpoint that training started from, but for those that are float32 whatever the
    model's dtype is (correction biases of routers). A folder `path` is there only once it is complete; an earlier one
    is replaced.

    Args:
        source: that checkpoint, for the config and the tokenizer.
        path: of the new one.

    Raises:
        ParallelError: another rank could not gather or write.
    """
    partial = path.with_name(f"{path.name}.partial")
    problem: Exception | None = None
    with policy.barrier.guard():
        writer = _Writer(partial, source, policy) if dist.get_rank() == 0 else None
    with policy.barrier.guard():
        for name, weight in policy.named_weights():
            tensor = gathered(weight)
            if writer is None or problem is not None:
                continue
            try:
                writer.add(name, weight, tensor)
            except Exception as error:  # raised when the other ranks have gathered with this one to the end
                problem = error
        if problem is not None:
            raise problem
        if writer is not None:
            writer.close()
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)


class _Writer:
    """Shards of at most `SHARD_BYTES`, or one tensor, and their index."""

    def __init__(self, folder: Path, source: str, policy: Policy) -> None:
        from transformers import AutoConfig

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = AutoConfig.from_pretrained(source)
        config.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        if (sampling := Path(source) / "generation_config.json").is_file():
            shutil.copy(sampling, folder)
        self._folder = folder
        self._dtype = config.dtype or torch.float32
        self._shard: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, weight: LazyWeight, tensor: Tensor) -> None:
        kept = weight.keep_dtype or not tensor.is_floating_point()
        tensor = tensor.to("cpu", tensor.dtype if kept else self._dtype).contiguous().clone()
        if self._shard and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._shard[name] = tensor
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        self._write()
        count, weight_map = len(self._files), {}
        for number, names in enumerate(self._files, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            (self._folder / f"{number}.safetensors").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write(self) -> None:
        self._files.append(list(self._shard))
        save_file(self._shard, self._folder / f"{len(self._files)}.safetensors", metadata={"format": "pt"})
        self._shard, self._bytes = {}, 0
