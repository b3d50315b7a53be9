"""Positions of vision-language models: which models read a position in three parts, and what their input must say.

With multimodal rope a model places the patches of an image by time, height and width, and text goes on after the
longest of these. Positions come as `[3, B, S]`, as the model's own `get_rope_index` makes them, or as `[4, B, S]`: with
the position in the sequence before them, which rises by one whatever the token is.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ReplayError

_PARTS = 3
# Read outside the decoder too, but no input of it.
_OUTPUT = {"labels", "logits_to_keep"}
_REMEDY = (
    "pass the model's own positions. get_rope_index gives [3, B, S] of a padded batch; "
    "Packing.position_ids(multimodal=...) puts them into packed rows, [4, R, N] with the text positions first"
)


class ModelInputs:
    """A model's inputs besides those of its decoder: images, sound, their grids, and token types.

    Attributes:
        multimodal_rope: whether the model derives positions in three parts from them (it has a `get_rope_index`).

    Args:
        model: a transformers model, or a wrapper around one.
    """

    def __init__(self, model: nn.Module) -> None:
        takers: list[Any] = [m for m in model.modules() if hasattr(m, "get_decoder") and _takes(type(m), "input_ids")]
        decoder = takers[0].get_decoder() if takers else None
        around = [m for m in takers if m is not decoder and m.get_decoder() is decoder]
        declared = {name for module in around for name in _parameters(type(module))}
        self._names = declared - _parameters(type(decoder)) - _OUTPUT
        self._names |= {name for name in declared if is_type_ids(name)}
        self.multimodal_rope = any(hasattr(module, "get_rope_index") for module in model.modules())

    def given(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Names of the tensors, or collections of them, in `kwargs` that are read outside the decoder."""
        return [name for name in sorted(self._names) if isinstance(kwargs.get(name), Tensor | list | tuple | dict)]

    def position_problem(self, kwargs: Mapping[str, Any]) -> str | None:
        """The problem with the positions of a forward on `kwargs`, in words: they do not fit the images. None if they
        do.

        Waits for the device if token types have to show whether there are images.
        """
        position_ids = kwargs.get("position_ids")
        if not isinstance(position_ids, Tensor):
            return None
        if position_ids.dim() == 3 and not self.multimodal_rope:
            return (
                f"position_ids: expected [B, S], got {tuple(position_ids.shape)}: this model has no multimodal rope "
                "(get_rope_index), and takes one position a token"
            )
        if position_ids.dim() == 2 and self.multimodal_rope:
            shown = [name for name in self.given(kwargs) if not is_type_ids(name) or kwargs[name].any()]
            if shown:
                return (
                    f"position_ids: expected [3, B, S] or [4, B, S] beside {', '.join(shown)}, got [B, S] = "
                    f"{tuple(position_ids.shape)}. This model places an image by time, height and width, and text "
                    f"after it by what these took: {_REMEDY}"
                )
        return None

    def require_positions(self, kwargs: Mapping[str, Any]) -> None:
        """Check the positions of a forward in which only transformers separates packed sequences.

        Raises:
            ReplayError: they do not fit the images beside them, or do not show that rows are packed.
        """
        problem = self.position_problem(kwargs)
        position_ids = kwargs.get("position_ids")
        if problem is None and isinstance(position_ids, Tensor) and _hides_sequences(position_ids):
            problem = (
                f"position_ids: expected [4, B, S] for packed rows, with the text positions first, got "
                f"{tuple(position_ids.shape)}: without them transformers lets packed sequences see each other; "
                f"{_REMEDY}"
            )
        if problem is not None:
            raise ReplayError(problem)


def is_type_ids(name: str) -> bool:
    """Whether a keyword of this name has token types `[B, S]`: text, or something else."""
    return name.endswith("token_type_ids")


def text_positions(position_ids: Tensor) -> Tensor:
    """int64 `[B, S]`, each position in its sequence, of whole rows.

    Args:
        position_ids: `[B, S]`, `[4, B, S]` with these positions first, or `[3, B, S]`: there a sequence begins where
            all three parts are 0, and nowhere else. Where such rows do not begin at 0, or text in them does not rise
            by one, the result does neither.
    """
    if position_ids.dim() == 2:
        return position_ids
    if position_ids.shape[0] > _PARTS:
        return position_ids[0]
    count = torch.arange(position_ids.shape[-1], device=position_ids.device).expand(position_ids.shape[1:])
    begins = _all_zero(position_ids)
    since_begin = count - torch.where(begins, count, 0).cummax(-1).values
    # Text has three equal parts; patches of an image, except the first, do not.
    text, last = (position_ids == position_ids[0]).all(0), position_ids.amax(0)
    torn = ~begins
    torn[:, 1:] &= text[:, 1:] & text[:, :-1] & (last.diff() != 1)
    return torch.where(torn, last, since_begin)


def _hides_sequences(position_ids: Tensor) -> bool:
    """Whether `[3, B, S]` are of packed rows, which transformers can only separate by text positions.

    Waits for the device.
    """
    if position_ids.dim() != 3 or position_ids.shape[0] != _PARTS:
        return False
    zero = _all_zero(position_ids)
    return bool((zero[:, 1:-1] & ~zero[:, :-2] & ~zero[:, 2:]).any())


def _all_zero(position_ids: Tensor) -> Tensor:
    return (position_ids == 0).all(0)


@functools.cache
def _parameters(cls: type) -> frozenset[str]:
    forward = getattr(cls, "forward", None)
    return frozenset() if forward is None else frozenset(inspect.signature(forward).parameters)


def _takes(cls: type, name: str) -> bool:
    return name in _parameters(cls)
