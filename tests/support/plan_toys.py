"""Small layers in vLLM's real bracket, and syncs of them with a load plan and without, for the tests of plans."""

import contextlib

import pytest
import torch
from torch import nn

from r3.weight_sync.integrity.digest import ContentDigests
from r3.weight_sync.worker.load_plan.layer_record import held_tensors, own_tensors
from r3.weight_sync.worker.reload import LayerwiseReload


def halves(param: nn.Parameter, loaded: torch.Tensor, half: int) -> None:
    """A loader of a fused layer: gate above up."""
    rows = param.shape[0] // 2
    param.data.narrow(0, half * rows, rows).copy_(loaded)


class Fused(nn.Module):
    """A fused layer with one weight; `process` is what its quantisation method does to it."""

    def __init__(self, process=None, rows: int = 4, columns: int = 8, loader=halves) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * rows, columns), requires_grad=False)
        self.weight.weight_loader = loader
        self.norm_like = nn.Parameter(torch.zeros(columns), requires_grad=False)
        if process is not None:
            self.quant_method = method_of(process)


def method_of(process):
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Method(QuantizeMethodBase):
        def create_weights(self, layer, *args, **kwargs):
            raise NotImplementedError

        def apply(self, layer, *args, **kwargs):
            raise NotImplementedError

        def process_weights_after_loading(self, layer):
            process(self, layer)

    return Method()


class Toy(nn.Module):
    """Two fused layers, of which the second is always plain. Names: `one.gate`, `one.up`, `one.norm_like`, ..."""

    def __init__(self, process=None, **settings) -> None:
        super().__init__()
        self.one = Fused(process, **settings)
        self.two = Fused()

    def load_weights(self, weights):
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        for name, weight in weights:
            if "rotary" in name:
                continue
            layer, part = name.rsplit(".", 1)
            layer = self.get_submodule(layer)
            if part in ("gate", "up"):
                layer.weight.weight_loader(layer.weight, weight, ("gate", "up").index(part))
            else:
                param = getattr(layer, part)
                getattr(param, "weight_loader", default_weight_loader)(param, weight)


def weights_of(seed: int, layers=("one", "two"), rows: int = 4, columns: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (rows, columns), "up": (rows, columns), "norm_like": (columns,)}
    return {f"{la}.{part}": torch.randn(shape, generator=generator) for la in layers for part, shape in shapes.items()}


def initial(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """As vLLM starts an engine: metadata is recorded, weights are loaded and processed."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    record_metadata_for_reloading(model)
    model.load_weights(weights.items())
    for layer in model.modules():
        if (method := getattr(layer, "quant_method", None)) is not None:
            method.process_weights_after_loading(layer)
    return model


def manifest_of(weights) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in weights.items()}


def synced(
    model, config, weights, plan=None, chunk: int = 1, given: bool = True, digests: ContentDigests | None = None
) -> LayerwiseReload:
    """One sync. The caller's memory is used again as soon as a chunk is loaded, as transports do.

    With `digests` they write what goes into the engine whole, as in a worker.
    """
    reload = LayerwiseReload(model, config, plan)
    reload.begin(manifest_of(weights) if given else None)
    items = list(weights.items())
    for start in range(0, len(items), chunk):
        part = [(name, tensor.clone()) for name, tensor in items[start : start + chunk]]
        into = reload.whole_targets(part) if digests is not None else {}
        if digests is not None:
            digests.add(part, into)
        reload.load(part, written=into)
        for _, tensor in part:
            tensor.fill_(77)
    assert reload.missing() == []
    reload.finish()
    return reload


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a model computes with, also those that layers keep aside."""
    found = {}
    for name, layer in model.named_modules():
        found |= {f"{name}.{n}": t for n, t in own_tensors(layer).items()}
        found |= {f"{name}#{i}": t for i, t in enumerate(held_tensors(layer).values())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.stride() == expected[name].stride(), name
        assert torch.equal(tensor, expected[name]), name


def planned_equals_slow(make, config, weights=weights_of, chunk: int = 1):
    """Learn, then sync moved weights with the plan; the same syncs without it must leave the same bits everywhere."""
    with_plan, without = initial(make(), weights(0)), initial(make(), weights(0))
    plan = synced(with_plan, config, weights(1), chunk=chunk).learned
    addresses = {name: p.data_ptr() for name, p in with_plan.named_parameters()}
    reload = LayerwiseReload(with_plan, config, plan)
    synced(without, config, weights(1), chunk=chunk)
    for seed, digests in ((2, None), (3, ContentDigests())):
        synced(with_plan, config, weights(seed), plan, chunk, digests=digests)
        synced(without, config, weights(seed), chunk=chunk)
        assert_same(state(with_plan), state(without))
    assert {name: p.data_ptr() for name, p in with_plan.named_parameters()} == addresses
    assert reload.learned is plan
    return plan


def derive(method, layer):
    layer.cache = layer.weight.sum(0)


def twice(param, loaded, half):
    halves(param, loaded, half)
    halves(param, loaded, half)


@contextlib.contextmanager
def raw():
    """Linear layers and experts without the prepacking of CPU builds: processing is otherwise vLLM's own."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.v1.attention.backends.mla.amx_mla import AMXMLAImpl

    def dispatch(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    patch = pytest.MonkeyPatch()
    patch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)
    patch.setattr(cpu_moe.CPUUnquantizedExperts, "process_weights_after_loading", lambda self, layer: None)
    if not torch.accelerator.is_available():
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM 0.32's CPU worker has it
    patch.setattr(AMXMLAImpl, "uses_amx_bmm", False)
    patch.setattr(AMXMLAImpl, "process_weights_after_loading", lambda self, act_dtype: None)
    try:
        yield
    finally:
        patch.undo()
