"""Adapter-only updates, for an engine that applies adapters itself."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from r3.errors import SyncError
from r3.weight_sync.weights.lazy import LazyWeight, as_source, gathered
from r3.wrappers import COMPILED, own_path


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterWeights:
    """An adapter of PEFT.

    Attributes:
        weights: under the names of an `adapter_model.safetensors`.
        config: of an `adapter_config.json`.
    """

    weights: list[tuple[str, LazyWeight]]
    config: dict[str, Any]

    def save(self, folder: str | Path, *, write: bool = True) -> Path:
        """Write the adapter to `folder`. Sharded: every rank calls this, one with `write=True`."""
        full_tensors = {name: gathered(source) for name, source in self.weights}
        folder = Path(folder)
        if write:
            from safetensors.torch import save_file

            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in full_tensors.items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True))
        return folder


def adapter_weights(model: nn.Module, *, adapter: str = "default") -> AdapterWeights:
    """The weights of one adapter of `model` and its configuration, without the model under it.

    vLLM applies adapters itself: start the engine with `enable_lora=True` and `max_lora_rank` of at least the
    adapter's rank, `save` the adapter to a folder that the engine's workers can read, and generate with
    `lora_request=LoRARequest(f"policy-{version}", version, str(folder))`. A new id for each version (from 1) makes the
    worker read the folder, and keeps the prefix cache apart. `load_inplace=True` replaces the adapter of the same id,
    but not what is cached under it: reset the prefix cache then. No digest is compared and nothing is committed: it is
    vLLM that reads the files, and it refuses modules that it does not support, `modules_to_save` among them.

    Args:
        model: a `PeftModel`, plain or wrapped.
        adapter: its name.

    Raises:
        SyncError: no PEFT model, or no adapter of this name.
    """
    peft = sys.modules.get("peft")  # made the model, if it is one of PEFT's
    inner: Any = model if peft is not None else None
    while inner is not None and not isinstance(inner, peft.PeftModel):  # pyrefly: ignore
        inner = next((child for n in (COMPILED, "module") if (child := inner._modules.get(n)) is not None), None)
    if peft is None or inner is None:
        raise SyncError(f"model: expected a PeftModel, plain or wrapped, got {type(model).__name__}")
    if adapter not in inner.peft_config:
        raise SyncError(f"adapter: expected one of {sorted(inner.peft_config)}, got {adapter!r}")
    state = peft.get_peft_model_state_dict(inner, _state(inner), adapter, save_embedding_layers=False)
    config = inner.peft_config[adapter].to_dict()
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    weights = [(own_path(name), as_source(own_path(name), tensor)) for name, tensor in sorted(state.items())]
    return AdapterWeights(weights=weights, config=json.loads(json.dumps(plain, default=str)))


def _state(inner: nn.Module) -> dict[str, Tensor]:
    """All tensors by module path, the names by which PEFT finds its own."""
    from torch.distributed.fsdp import FSDPModule

    for module in inner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}
