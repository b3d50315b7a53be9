"""Helpers for one layer of vLLM's model in a layerwise reload."""

from collections.abc import Iterable

from torch import Tensor, nn

from r3.vllm_compat.reload import filled_numel, never_counted


def address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr()


def computing(layer: nn.Module) -> Iterable[Tensor]:
    """The parameters that the engine computes with, also while vLLM's bracket has others in their place."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(layer)
    if info.can_load() and info.kernel_tensors is not None:
        return info.kernel_tensors[0].values()
    return layer.parameters(recurse=False)


def put_back(layer: nn.Module) -> None:
    """Put the tensors that the engine computes with back into an open layer, and close it."""
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.get_layerwise_info(layer)
    if info.can_load() and info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(layer, info)
        info.reset()


def loadable_numel(layer: nn.Module, name: str, param: Tensor) -> int:
    """Elements of `param` that a checkpoint fills, as vLLM counts them: without the rows that pad a vocabulary."""
    if name in never_counted():
        return 0
    numel = filled_numel(param)
    rows = getattr(layer, "num_embeddings_per_partition", None)
    indices = getattr(layer, "shard_indices", None)
    if rows is None or indices is None or param.shape[:1] != (rows,):
        return numel
    return numel // rows * indices.num_org_elements
