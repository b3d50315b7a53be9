"""vLLM's layerwise reload, bracketed once around a whole sync. Runs in the engine's workers.

Faults of vLLM's reload that are prevented here (tests without 2 and 4 see a wrong result):
1. One bracket for the whole sync: a bracket a chunk would put every layer absent from a chunk back to its old tensors.
2. CPU builds from 0.28: experts are prepacked only while `moe_kernel is None`, so a reload of identical weights changes
   the output. The kernel is dropped as its layer is processed; vLLM then rebuilds it, and prepacks.
3. A part of a fused layer is loaded without complaint: what is missing is found before the bracket closes.
4. A bracket that never closed is given up before the next one begins, with all that it has counted and kept: vLLM's
   `initialize_layerwise_reload` passes over layers that are being loaded, and a layer would close early.
5. Router and shared-expert gate, joined once by `MoERunner`, are joined again when the bracket closes.
6. Other tensors that derive from weights, or are views of them, are recomputed or refused by name
   (`worker.derived_tensors`).

The first complete sync also learns a load plan (`worker.load_plan`); with it, later ones copy straight into the
engine's tensors, and only what could not be proved goes through vLLM's loaders. If nothing is left for the loaders,
vLLM's bracket is not opened: its layers stay in place, and derived tensors are recomputed at the end.
"""

import logging
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import SyncError, summary
from r3.vllm_compat.reload import expert_prepack, is_deferred, join_gates
from r3.weight_sync.worker.derived_tensors import DerivedTensors
from r3.weight_sync.worker.load_plan.layer_record import own_tensors
from r3.weight_sync.worker.load_plan.plan import LoadPlan, Manifest, Planned
from r3.weight_sync.worker.load_plan.trace import LoadTracer
from r3.weight_sync.worker.rehearsal import likely_cause, rehearse
from r3.weight_sync.worker.reload_layers import address, computing, loadable_numel, put_back

logger = logging.getLogger(__name__)

_ASIDE_BYTES = 512 << 20


class LayerwiseReload:
    """One bracket: `begin`, `load` any number of times, `missing`, `finish`; or `abandon`.

    Args:
        model: the worker's model.
        vllm_config: the worker's configuration; set as current around every call, as vLLM's loaders expect.
        plan: what an earlier bracket on this model `learned`. Without one, or with one of other tensors, this bracket
            goes through vLLM's loaders and learns.
        derived: the model's, from one bracket to the next; by default a new one.
        kept: layers that receive nothing on purpose, and keep what they have.

    Attributes:
        layers: the model's modules, by name.
        learned: the plan of a bracket that went well; before, `plan`.
    """

    def __init__(
        self,
        model: Any,
        vllm_config: Any,
        plan: LoadPlan | None = None,
        kept: Iterable[str] = (),
        derived: DerivedTensors | None = None,
    ) -> None:
        self._model = model
        self.layers: dict[str, nn.Module] = dict(model.named_modules())
        self._config = vllm_config
        self._plan = plan
        self._derived = derived or DerivedTensors(model)
        self._aside: list[tuple[nn.Module, str, Tensor]] = []  # buffers kept out of vLLM's bracket
        self._kept = frozenset(kept)
        self._planned: Planned | None = None
        self._learner: LoadTracer | None = None
        self._opened = False  # vLLM's bracket
        self.learned: LoadPlan | None = plan

    @property
    def planned(self) -> bool:
        """Whether this bracket uses the plan; known after `begin`."""
        return self._planned is not None

    @property
    def only_copies(self) -> bool:
        """Whether loading queues copies, and nothing that could wait for the device; known after `begin`."""
        return self._planned is not None and not self._planned.plan.slow_sources

    def begin(self, manifest: Manifest | None = None) -> None:
        """Open the bracket.

        Args:
            manifest: name -> shape, dtype of what will come. Other tensors than the plan's: it is not used. None: what
                comes is taken to be the plan's, tensor by tensor; a layer that gets both planned and other tensors is
                then `missing` something.
        """
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.abandon()
        if manifest is not None and self._plan is not None and self._plan.covers(manifest, self._kept):
            self._planned = Planned(plan=self._plan, targets=self._live_tensors(self._plan.layers))
            if not self._planned.mismatches():
                return
        self._opened = True
        serves = self._plan is not None and (manifest is None or self._plan.serves(manifest))
        if not serves:
            self._derived.look()
        self._set_aside()
        with self._context():
            initialize_layerwise_reload(self._model)
        for layer, own, *_ in self._aside:
            layer._buffers.pop(own, None)
        kernel = self._kernel_tensors()
        if self._plan is not None and serves:
            self._planned = Planned(plan=self._plan, targets=kernel)
            if not (changed := self._planned.mismatches()):
                return
            self._planned = None
            logger.warning("The engine's tensors have changed; the load plan is learned again:%s", summary(changed))
        self._learner = LoadTracer(self._model, kernel)

    def misfits(self, manifest: Manifest) -> list[str]:
        """Misfits of `manifest`, one line each; the last line may give the likely cause. Touches nothing."""
        if self._plan is not None and self._plan.is_of(manifest, self._kept):
            return []
        problems = self._rehearse(manifest)
        if problems and (cause := likely_cause(manifest, problems, self._rehearse)):
            problems.append(cause)
        return problems

    def _rehearse(self, manifest: Manifest) -> list[str]:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.abandon()
        self._opened = True
        try:
            with self._context():
                return rehearse(self._model, manifest, lambda: initialize_layerwise_reload(self._model), self.missing)
        finally:
            self._opened = False

    def whole_targets(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Engine tensors that some of `weights` are copied into unchanged, by name: contiguous, with as many elements.

        A caller that reads the weights anyway can write them there, and `load` need not read them again.
        """
        if self._planned is None:
            return {}
        with torch.no_grad():
            return self._planned.whole_targets(weights)

    def load(self, weights: Iterable[tuple[str, Tensor]], written: Container[str] = ()) -> None:
        """Load some of the checkpoint's tensors. On a GPU this is queued on the current stream.

        Args:
            weights: names and tensors.
            written: names of weights that the caller has written to their `whole_targets`.
        """
        if self._planned is not None:
            with torch.no_grad():
                weights = self._planned.take(weights, written)
            if weights and not self._opened:
                raise SyncError(
                    f"{weights[0][0]}: expected what the manifest announced, got {tuple(weights[0][1].shape)}, "
                    f"{weights[0][1].dtype}"
                )
        for part in _parts(weights):
            self._load_by_vllm(part)

    def _load_by_vllm(self, part: Iterable[tuple[str, Tensor]]) -> None:
        # vLLM keeps references until the layer is complete, and the memory belongs to the caller: copy.
        kept = [(name, tensor.detach().clone(memory_format=torch.contiguous_format)) for name, tensor in part]
        at: list[str] = []
        try:
            with self._context(), self._learner.watching(kept) if self._learner else nullcontext():
                self._model.load_weights(_tracking_name(kept, at))
        except Exception as error:
            failed = at[-1] if at else kept[0][0]
            shape = next(tuple(tensor.shape) for name, tensor in kept if name == failed)
            why = f"{type(error).__name__}: {str(error)[:400]}"
            raise SyncError(f"{failed} {shape}: vLLM did not load it: {why}") from error

    def missing(self) -> list[str]:
        """Layers that lack weights, each with the number of elements received and needed."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        planned = {} if self._planned is None else self._planned.plan.layers
        received = {} if self._planned is None else self._planned.received
        targets = {} if self._planned is None else self._planned.targets
        # If the plan covers everything, a layer outside it receives nothing in any sync.
        names = list(self.layers if self._opened else planned)
        problems = {}
        for name in names:
            layer = self.layers[name]
            info = get_layerwise_info(layer)
            got = info.load_numel if info.can_load() else 0
            if name in self._kept:
                if got or received.get(name, 0):
                    came = got + received.get(name, 0)
                    problems[name] = f"{name} ({type(layer).__name__}): to be kept, and yet {came} elements came"
            elif name in planned:
                taken, expected = received.get(name, 0), planned[name].elements
                if got or taken < expected:
                    mixed = f", and {got} that the plan does not know" if got else ""
                    problems[name] = f"{name} ({type(layer).__name__}): {taken} of {expected} elements{mixed}"
            elif info.can_load() and not is_deferred(layer):  # whose scales, where it has any, are optional
                # Of parameters: buffers (rotary tables) are in no checkpoint.
                expected = sum(loadable_numel(layer, n, p) for n, p in layer.named_parameters(recurse=False))
                if got < expected:
                    problems[name] = f"{name} ({type(layer).__name__}): {got} of {expected} elements"
        if not problems:
            return []
        complete = {
            address(tensor)
            for name in names
            if name not in problems
            for tensor in (targets[name].values() if name in planned else computing(self.layers[name]))
        }
        return [text for name, text in problems.items() if not self._tied(self.layers[name], complete)]

    def _tied(self, layer: nn.Module, complete: set[int]) -> bool:
        """Whether a layer that received nothing shares its tensors with a complete one (a tied output layer)."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        info = get_layerwise_info(layer)
        if info.load_numel or not info.kernel_tensors:
            return False
        parameters = [tensor for tensor in info.kernel_tensors[0].values() if tensor.numel()]
        return bool(parameters) and all(address(tensor) in complete for tensor in parameters)

    def finish(self) -> None:
        """Close the bracket. Layers that received no weights keep what they had; derived tensors are recomputed.

        Raises:
            SyncError: a planned layer also got tensors that the plan does not know.
        """
        if self._planned is not None:
            with torch.no_grad():
                self._planned.fill()
        learning = self._learner is not None and not self.missing()
        with self._context(), self._learner.watching([], closing=True) if self._learner else nullcontext():
            if self._opened:
                self._close()
            else:
                self._derive()
            self._derive_besides()
        if self._learner is not None:
            self.learned = replace(self._learner.plan(), kept=self._kept) if learning else self._plan
            self._require_derived(self._learner)
        self._planned, self._learner, self._opened = None, None, False

    def _close(self) -> None:
        """Close vLLM's bracket."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        if self._planned is not None:
            layers = {name: self.layers[name] for name in self._planned.plan.layers}
            mixed = [name for name, layer in layers.items() if get_layerwise_info(layer).load_numel > 0]
            if mixed:
                raise SyncError(
                    f"{len(mixed)} layers got both planned tensors and others; expected one set of names a sync, "
                    f"given to `begin` as its manifest:{summary(mixed)}"
                )
            # Before vLLM closes the bracket: it would take them for layers that failed to load, and say so.
            for layer in layers.values():
                put_back(layer)
        for name in self._kept:
            put_back(self.layers[name])
        finalize_layerwise_reload(self._model, self._config.model_config)

    def _derive(self) -> None:
        """Recompute what vLLM derives from weights when it closes a bracket, after one in which vLLM loaded nothing."""
        for layer in filter(is_deferred, self.layers.values()):
            layer.process_weights_after_loading(self._config.model_config.dtype)  # pyrefly: ignore

    def _derive_besides(self) -> None:
        """Recompute what vLLM derives when it loads a model, but not when it reloads one."""
        self._put_aside_back()
        for name in self._derived.views:
            # Processed weights may be packed; their views were copied before that.
            if not self._derived.processed(name) or (self._planned and name in self._planned.plan.layers):
                self._derived.refresh(name)
        if callable(hook := getattr(self._model, "process_weights_after_loading", None)):
            hook()  # pyrefly: ignore
        join_gates(self.layers.values())

    def _require_derived(self, learner: LoadTracer) -> None:
        """Raise `SyncError` if a tensor still derives from the weights before this bracket."""
        if self._derived.written_by(learner.written_by_loaders):
            self.learned = None  # a planned sync calls no loaders
        kept = tuple(f"{name}." for name in self._kept)
        if stale := [text for text in self._derived.stale(learner.written) if not text.startswith(kept)]:
            raise SyncError(
                f"{len(stale)} tensors of the engine may derive from weights, and vLLM did not make them anew: the "
                "engine would go on with old ones. Start a new engine for each version of such a model; what is known "
                f"not to derive from weights can be named (WeightSync, engine_constants):{summary(stale)}"
            )

    def _set_aside(self) -> None:
        """Take out of their layers the buffers that vLLM's bracket would lose or overwrite."""
        for name, own in self._derived.kept_buffers:
            layer = self.layers[name]
            if (tensor := layer._buffers.pop(own, None)) is not None:
                self._aside.append((layer, own, tensor))

    def _put_aside_back(self) -> None:
        while self._aside:
            layer, own, tensor = self._aside.pop()
            layer._buffers.pop(own, None)
            layer.register_buffer(own, tensor, persistent=False)

    def abandon(self) -> None:
        """Abandon the bracket: the engine's tensors are back in place, with new, old or mixed weights."""
        from vllm.model_executor.model_loader.reload.layerwise import LOADING_LAYERS, get_layerwise_info

        for layer in self.layers.values():
            if get_layerwise_info(layer).can_load():
                put_back(layer)
        LOADING_LAYERS.clear()
        self._put_aside_back()
        if hasattr(self._model, "_original_do_torchao_reload"):
            self._model._do_torchao_reload = self._model._original_do_torchao_reload
        self._planned, self._learner, self._opened = None, None, False

    def _live_tensors(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The layers' parameters and buffers as plain tensors, without the Python overhead of vLLM's parameter
        classes."""
        aside = set(self._derived.kept_buffers)
        with torch._C.DisableTorchFunctionSubclass():
            return {
                name: {n: t.data for n, t in own_tensors(self.layers[name]).items() if (name, n) not in aside}
                for name in names
                if name in self.layers
            }

    def _kernel_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Layer -> name -> tensor that the engine computes with."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        tensors = {}
        for name, layer in self.layers.items():
            parameters, buffers = get_layerwise_info(layer).kernel_tensors or ({}, {})
            if parameters or buffers:
                tensors[name] = parameters | buffers
        return tensors

    @contextmanager
    def _context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        config = set_current_vllm_config(self._config)
        with config, torch.no_grad(), expert_prepack(), self._derived.refreshing():
            yield


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """`weights` in parts of at most the size that may be copied at once; a larger weight is a part of its own."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > _ASIDE_BYTES:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    if part:
        yield part


def _tracking_name(weights: Iterable[tuple[str, Tensor]], at: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over `weights`, with the name of the current one in `at`."""
    for name, tensor in weights:
        at[:] = [name]
        yield name, tensor
