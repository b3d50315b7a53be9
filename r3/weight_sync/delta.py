"""Delta syncs: only what changed since the version that all workers acknowledged, bit-exact.

Both sides keep that version's tensors in main memory. For a tensor that changed in few places, the positions and new
values are sent; for any other that changed, the whole tensor; for the rest, nothing. The worker restores all tensors,
and from there on the sync is a complete one: every tensor is loaded and its digest compared.

A failure ends the base on both sides: a sync without one is complete, and makes a new one.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from r3.errors import SyncError
from r3.weight_sync.transports.transport import Chunk

_GAPS, _VALUES = "\0gaps", "\0values"
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ESCAPE = 255


@dataclass
class DeltaBase:
    """The tensors of a version.

    Attributes:
        version: that they belong to; None while a sync is changing them, and after it failed.
        tensors: contiguous, in main memory.
    """

    version: int | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, complete: bool) -> None:
        self.version = None
        if complete:
            self.tensors.clear()

    def encode(self, chunk: Chunk) -> Chunk:
        """Encode `chunk` for the receiver's `decode`. The base's tensors become those of `chunk`."""
        sent: Chunk = []
        for name, tensor in chunk:
            new = tensor.detach().cpu().contiguous()
            old = self.tensors.get(name)
            if old is None or (old.shape, old.dtype) != (new.shape, new.dtype):
                sent.append((name, tensor))
                self.tensors[name] = new.clone() if new.data_ptr() == tensor.data_ptr() else new
                continue
            change = changes(new, old)
            if change is None:
                sent.append((name, tensor))
            elif change[0].numel():
                sent += [(name + _GAPS, change[0]), (name + _VALUES, change[1])]
            old.copy_(new)
        return sent

    def decode(self, names: list[str], sent: Chunk) -> Chunk:
        """Decode the tensors `names`, whole, in main memory. The base's tensors become these.

        Raises:
            SyncError: a tensor has no base here, or does not fit it.
        """
        came = dict(sent)
        for name in names:
            if name in came:
                self.tensors[name] = came.pop(name).cpu().clone()
            elif name not in self.tensors:
                raise SyncError(f"{name}: neither sent nor in the base of this worker")
            elif name + _GAPS in came:
                apply_changes(self.tensors[name], came.pop(name + _GAPS).cpu(), came.pop(name + _VALUES).cpu(), name)
        if came:
            raise SyncError(f"sent, but not announced: {sorted(came)[:16]}")
        return [(name, self.tensors[name]) for name in names]


def changes(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gaps between the changed elements, and their new bits; None if the whole tensor is smaller than that.

    A gap g, of unchanged elements before a changed one, is g // 255 bytes of 255 and one of g % 255: about one byte a
    change.

    Returns:
        uint8 of any length; an integer tensor as wide as the elements, one a change.
    """
    words = _WORDS[new.element_size()]
    bits = new.reshape(-1).view(words)
    at = (bits != old.reshape(-1).view(words)).nonzero().reshape(-1)
    if at.numel() * (1 + new.element_size()) >= new.nbytes:
        return None
    gaps = np.diff(at.numpy(), prepend=-1) - 1
    escapes, rest = np.divmod(gaps, _ESCAPE)
    coded = np.full(int(escapes.sum()) + len(gaps), _ESCAPE, np.uint8)
    coded[np.cumsum(escapes + 1) - 1] = rest
    return torch.from_numpy(coded), bits[at]


def apply_changes(tensor: Tensor, gaps: Tensor, values: Tensor, name: str = "tensor") -> None:
    """Put `values` where `gaps` says, in place."""
    coded = gaps.numpy()
    ends = coded != _ESCAPE
    at = np.cumsum(coded, dtype=np.int64)[ends] + np.arange(int(ends.sum()))
    flat = tensor.view(-1).view(_WORDS[tensor.element_size()])
    if len(at) != values.numel() or values.dtype != flat.dtype or (len(at) and at[-1] >= flat.numel()):
        raise SyncError(
            f"{name}: {len(at)} positions up to {at[-1] if len(at) else None} and {values.numel()} values of "
            f"{values.dtype} do not fit {flat.numel()} elements of {flat.dtype}"
        )
    flat[torch.from_numpy(at)] = values
