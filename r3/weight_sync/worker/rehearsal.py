"""Dry run of a sync: whether its manifest fits the engine's model, before a weight is touched.

vLLM's own loaders are given tensors without memory, while the model's are without memory too: they cut, fuse, count and
compare shapes as they always do, and nothing is copied. Misfits are reported with both shapes and, if it can be
inferred, the likely cause.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from r3.weight_sync.worker.load_plan.plan import Manifest

logger = logging.getLogger(__name__)

# Prefixes that names have or lack when another module is sent than the engine has.
_PREFIXES = ("model.", "language_model.", "model.language_model.", "language_model.model.")
_MANY = 8  # problems, after which no more are looked for


def rehearse(
    model: nn.Module, manifest: Manifest, bracket: Callable[[], Any], missing: Callable[[], list[str]]
) -> list[str]:
    """Problems of `manifest`, one line each. What depends on the values is left to the sync itself.

    Args:
        model: as the engine computes with it; it is left as it was.
        manifest: what will be sent.
        bracket: opens vLLM's bracket on `model`.
        missing: lists the layers that have not got all their weights.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    with _unchanged(model):
        bracket()
        _without_memory(model)
        loaded = _Loaded(model, layerwise.get_numel_loaded)
        originals = (layerwise._layerwise_process, layerwise.get_numel_loaded)
        layerwise._layerwise_process, layerwise.get_numel_loaded = (lambda layer, info: None), loaded
        try:
            problems, all_seen = _feed(model, manifest, loaded)
        finally:
            layerwise._layerwise_process, layerwise.get_numel_loaded = originals
        if not problems and all_seen:
            problems = [
                f"{layer}: not all of its weights are sent, or vLLM's reload passes over them" for layer in missing()
            ]
    return problems


def likely_cause(manifest: Manifest, problems: list[str], again: Callable[[Manifest], list[str]]) -> str:
    """A likely cause of `problems`: other names for the same tensors have fewer of them. Empty if there is none.

    Args:
        again: returns the problems of another manifest.
    """
    if any("vocabulary" in problem for problem in problems):
        return ""
    named: list[tuple[str, Callable[[str], str]]] = []
    for prefix in _PREFIXES:
        named.append((f"with `{prefix}` before each name", lambda name, prefix=prefix: prefix + name))
        if all(name.startswith(prefix) for name in manifest):
            named.append((f"without `{prefix}` before each name", lambda name, prefix=prefix: name[len(prefix) :]))
    first = next(iter(manifest), "").partition(".")[0] + "."
    if first not in _PREFIXES and len(first) > 1 and all(name.startswith(first) for name in manifest):
        named.append((f"without `{first}` before each name", lambda name: name[len(first) :]))
    best: tuple[int, str] | None = None
    for text, rename in named:
        left = again({rename(name): shape_and_dtype for name, shape_and_dtype in manifest.items()})
        if len(left) < len(problems) and len(left) <= 2 and (best is None or len(left) < best[0]):
            rest = f", but for {'; '.join(left)}" if left else ""
            best = (len(left), f"{text} they fit{rest}")
    if best is None:
        return ""
    return (
        f"Likely another module was sent than the engine runs (the inner model, or what wraps it): {best[1]}. Send "
        "named_weights of the whole model that the checkpoint is of"
    )


class _Loaded:
    """Replaces vLLM's `get_numel_loaded`, and records which tensors of the engine a failed load was for."""

    def __init__(self, model: nn.Module, original: Callable[..., Any]) -> None:
        self._model = model
        self._original = original
        self.failed = ""

    def __call__(self, loader: Callable[..., Any], args: Any) -> Any:
        try:
            return self._original(loader, args)
        except Exception:
            tensors = [value for value in args.arguments.values() if isinstance(value, Tensor)]
            self.failed = self._describe(args.arguments.get("param"), tensors[-1] if tensors else None)
            raise

    def _describe(self, parameter: Any, tensor: Tensor | None) -> str:
        for name, layer in self._model.named_modules():
            own = next((own for own, held in layer._parameters.items() if held is parameter), None)
            if own is None or tensor is None:
                continue
            vocabulary = getattr(layer, "org_vocab_size", None)
            if vocabulary is not None and tensor.shape[0] != vocabulary:
                return (
                    f"expected {vocabulary} rows, the vocabulary of the engine's checkpoint, got "
                    f"{tuple(tensor.shape)}. Was it resized (resize_token_embeddings)? Save the resized model "
                    "and start the engine from that"
                )
            return f"{tuple(tensor.shape)} does not fit {name}.{own} ({type(layer).__name__}) {tuple(parameter.shape)}"
        return ""


def _feed(model: Any, manifest: Manifest, loaded: _Loaded) -> tuple[list[str], bool]:
    """Load all tensors of `manifest`, past misfits. Returns the misfits, and whether all could be checked."""
    problems: list[str] = []
    all_seen = True
    left = list(manifest.items())
    while left and len(problems) < _MANY:
        fed = 0

        def weights(names: list = left) -> Iterator[tuple[str, Tensor]]:
            nonlocal fed
            for name, (shape, dtype) in names:
                fed += 1
                yield name, torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")

        loaded.failed = ""
        try:
            model.load_weights(weights())
        except Exception as error:
            name, (shape, _) = left[max(fed, 1) - 1]
            text = str(error)
            if isinstance(error, NotImplementedError) or "meta tensor" in text or "meta device" in text:
                # This loader reads values, which are missing here: the sync itself will show whether the tensor fits.
                logger.debug("%s: vLLM cannot load it without memory: %s", name, text[:200])
                all_seen = False
            else:
                misfit = loaded.failed or f"{tuple(shape)}: {text[:160] or type(error).__name__}"
                problems.append(f"{name}: {misfit}")
        left = left[max(fed, 1) :]
    return problems, all_seen


def _without_memory(model: nn.Module) -> None:
    """Replace the tensors that vLLM's bracket leaves in place by ones without memory."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    for layer in model.modules():
        for own in (layer._parameters, layer._buffers):
            for name, tensor in own.items():
                if tensor is not None and not tensor.is_meta:
                    own[name] = to_meta_tensor(tensor)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Context after which every module of `model` has its own tensors again, and vLLM has no open bracket."""
    from vllm.model_executor.model_loader.reload import layerwise

    modules = list(model.modules())
    own = ("_parameters", "_buffers", "_modules")
    before: list[tuple[dict[str, Any], Mapping[str, dict]]] = [
        (dict(vars(module)), {name: dict(vars(module)[name]) for name in own}) for module in modules
    ]
    persistent = [set(module._non_persistent_buffers_set) for module in modules]
    try:
        yield
    finally:
        for module, (attributes, tensors), names in zip(modules, before, persistent, strict=True):
            for name in own:
                attributes[name].clear()
                attributes[name].update(tensors[name])
            vars(module).clear()
            vars(module).update(attributes)
            module._non_persistent_buffers_set = names
            layerwise.get_layerwise_info(module).reset()
        layerwise.LOADING_LAYERS.clear()
