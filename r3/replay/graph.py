"""Marks in a decoder layer's autograd graph tell recomputed code inside the layer which forward it belongs to.

Checkpointing around a layer recomputes its call with its keywords. Checkpointing around a part of it (its MoE block)
recomputes only that part, in the backward pass, perhaps in another thread and after other forwards. Then only the graph
node that the backward pass evaluates is known. So a layer marks the nodes that produce its inputs, and recomputed code
searches from the current node towards the inputs: each path out of the layer leads through a mark.

A mark is an entry of the node's metadata, and lives as long as the graph.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

UNMARKED = object()


def mark_inputs(args: tuple, kwargs: dict, key: object, value: object) -> tuple[tuple, dict, bool]:
    """Mark the nodes that produce the inputs of a layer.

    Returns:
        The inputs, and whether any of them has a gradient. If none has, the layer is the first to be trained, and
        `mark_outputs` has to follow.
    """
    marked = False

    def mark(item: Any) -> Any:
        nonlocal marked
        if not (isinstance(item, Tensor) and item.requires_grad):
            return item
        marked = True
        node: Any = item.grad_fn
        # A leaf, or also an input of other forwards: give it a node that belongs to this forward alone.
        if node is None or node.metadata.get(key, value) is not value:
            item = item.view_as(item)
            node = item.grad_fn
        node.metadata[key] = value
        return item

    args = tuple(mark(item) for item in args)
    kwargs = {name: mark(item) for name, item in kwargs.items()}
    return args, kwargs, marked


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, dict)):
        for inner in output.values() if isinstance(output, dict) else output:
            yield from _tensors(inner)


def mark_outputs(output: Any, key: object, value: object) -> None:
    """Mark every node that leads to a tensor of `output`, up to those that are marked."""
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        # A parameter's node has no inputs, and belongs to all forwards.
        if node.next_functions and key not in node.metadata:
            node.metadata[key] = value
            nodes.extend(below for below, _ in node.next_functions if below is not None)


def evaluated_node() -> Node | None:
    """The node that the backward pass of this thread evaluates; None outside a backward pass."""
    return torch._C._current_autograd_node()


def packs_for_repeat() -> bool:
    """Whether saved-tensor hooks are active, as in code that non-reentrant checkpointing will recompute."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def nearest_mark(node: Node, key: object) -> object:
    """The mark at or below `node`, or `UNMARKED`."""
    nodes: deque[Any] = deque([node])
    seen = {node}
    while nodes:
        here = nodes.popleft()
        value = here.metadata.get(key, UNMARKED)
        if value is not UNMARKED:
            return value
        below = [after for after, _ in here.next_functions if after is not None and after not in seen]
        seen.update(below)
        nodes.extend(below)
    return UNMARKED


__all__ = ["UNMARKED", "evaluated_node", "mark_inputs", "mark_outputs", "nearest_mark", "packs_for_repeat"]
