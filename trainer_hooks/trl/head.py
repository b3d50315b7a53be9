"""TRL's fused head over the ids that each token was sampled from.

Shapes: B rows, S positions, n labels of one forward, H hidden, V vocabulary.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from r3.errors import ReplayError
from r3.parallel import IGNORED
from r3.parallel.head.passes import Tempering
from r3.parallel.head.scores import score
from r3.sampling_mask import SamplingMask


@contextlib.contextmanager
def over_sets(
    mask: SamplingMask | None, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> Iterator[None]:
    """Context in which TRL's forwards of these rows, one after the other, give log-probabilities over their sets.

    Args:
        mask: `[B, S]`, of the tokens themselves; None for the whole vocabulary.
        input_ids, attention_mask: `[B, S]`, as TRL's method gets them.
        logits_to_keep: columns of the completions.

    Raises:
        ReplayError: the forwards score other labels than those of these rows, or not all of them.
    """
    from trl.trainer import utils

    if mask is None:
        yield
        return
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :-logits_to_keep] = IGNORED
    # Where TRL has Triton, it leaves positions without a label out.
    head = _SetHead(labels[:, 1:], mask.to(labels.device), compact=utils._use_triton(labels.device))
    before, utils._ChunkedLogProbFunction = utils._ChunkedLogProbFunction, head
    try:
        yield
        head.require_all()
    finally:
        utils._ChunkedLogProbFunction = before


class _SetHead:
    """In place of TRL's `ChunkedLogProbFunction`.

    Args:
        labels: int64 `[B, S - 1]`, each position's next token.
        mask: `[B, S]`, of the tokens themselves.
        compact: whether TRL calls for the positions with a label alone.
    """

    def __init__(self, labels: Tensor, mask: SamplingMask, *, compact: bool) -> None:
        flat = labels.reshape(-1)
        places = (flat != IGNORED).nonzero()[:, 0] if compact else torch.arange(len(flat), device=flat.device)
        sets = mask.positions()[:, 1:].masked_fill(labels == IGNORED, -1).reshape(-1)
        self._labels, self._mask = flat[places], mask.take(sets[places])
        self._next = 0

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities `[n]`, entropy `[n]` without gradient or None, and three that nobody asked for.

        Args:
            hidden: `[n, H]`.
            weight, bias: `[V, H]`, and `[V]` or None.
            targets: int64 `[n]`; where there is no label, 0.
            temperature, softcap, scale: of the logits.
            chunk_size: not used.
            outputs: what TRL reads beside log-probabilities.
        """
        taken = slice(self._next, self._next + len(targets))
        self._next = taken.stop
        labels, mask = self._labels[taken].to(hidden.device), self._mask.select(taken).to(hidden.device)
        if labels.shape != targets.shape or not (labels.clamp(min=0) == targets).all():
            raise ReplayError(
                "TRL scores other tokens than those of the rows that it trains on: no place for their sets"
            )
        if more := set(outputs) - {"log_probs", "entropy"}:
            raise ReplayError(f"TRL reads {', '.join(sorted(more))} of its head, which are not known over sets")
        tempering = Tempering.of(temperature=temperature, scale=scale, softcap=softcap)
        details = "entropy" in outputs
        logprobs, *rest = score(hidden, weight, labels, bias, tempering, details=details, sampling_mask=mask)
        return logprobs, rest[0] if details else None, None, None, None

    def require_all(self) -> None:
        """Raise if a label is left."""
        if left := int((self._labels[self._next :] != IGNORED).sum()):
            raise ReplayError(f"expected TRL's head to score all tokens of its rows over their sets, {left} are left")
