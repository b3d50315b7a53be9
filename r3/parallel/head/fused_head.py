"""`fused_head`: log-probabilities of sampled tokens as the output of a stock Hugging Face causal model.

While a model scores labels, its head returns one number a token in place of logits. It does so in its own forward, so
that FSDP2 has gathered its weight, and the number leaves the model as its output, to which FSDP2 ties the backward
pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from r3.engine_value import with_value
from r3.errors import ParallelError
from r3.own_methods import BELOW_HOOK, code_of
from r3.parallel.head.after_head import REMEDY, AfterHead, find_after_head
from r3.parallel.head.passes import Tempering
from r3.parallel.head.scores import TokenScores, score
from r3.sampling_mask import SamplingMask

_SLOT = "_r3_fused_head"

EngineLogprobs = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Of hidden states `[T, H]`, weight `[V, H]`, labels `[T]` and temperature: float32 `[T]`, without gradient."""


@dataclass(kw_only=True)
class _Request:
    """The labels of one forward, and what the head found for them.

    Attributes:
        found: without gradient; None until the head has run.
    """

    labels: Tensor
    temperature: float
    sampling_mask: SamplingMask | None
    details: bool
    engine_logprobs: EngineLogprobs | None = None
    found: tuple[Tensor, ...] | None = None


class _Activity(threading.local):
    """What a head is asked for in the current thread; a copy of it is idle."""

    def __init__(self, head: nn.Module | None = None, after: AfterHead | None = None, before: Any = None) -> None:
        self.head = head
        self.after = after
        self.before = before  # the head's own method, of tensor parallelism for one; None for its class's
        self.request: _Request | None = None

    def __reduce__(self) -> Any:
        return type(self), ()


class FusedHead:
    """The handle that `fused_head` returns.

    Attributes:
        after: what the model does to its head's product.
        engine_logprobs: takes the place of the values of `logprobs`, whose gradients stay; set by `r3.numerics`.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = _transformers_model(model)
        head = inner.get_output_embeddings()
        _require_idle(inner, head)
        _require_linear(inner, head)
        self.after = find_after_head(inner)
        self.engine_logprobs: EngineLogprobs | None = None
        self._head: Any = head
        # Below accelerate's hooks, as replay is.
        self._name = BELOW_HOOK if BELOW_HOOK in head.__dict__ else "forward"
        self._before = head.__dict__.get(self._name)
        self._activity = _Activity(head, self.after, self._before)
        head.__dict__[_SLOT] = self._activity
        head.__dict__[self._name] = MethodType(_forward, head)

    def detach(self) -> None:
        """Give the head its own forward back. A second call does nothing."""
        if self._head.__dict__.get(_SLOT) is self._activity:
            _take_out(self._head, self._before)

    def logprobs(
        self,
        model: nn.Module,
        labels: Tensor,
        *,
        temperature: float = 1.0,
        sampling_mask: SamplingMask | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Float32 `[B, S]`, log-probability in nats of each label under `model(**inputs)`; 0 where it is -100.

        Args:
            model: the one that the handle was made for, as it is called now: sharded or wrapped.
            labels: int64 `[B, S]`, by position the next token; of this rank's slice.
            temperature: the logits are divided by it, as at sampling.
            sampling_mask: `[B, S]`, the ids that each label was sampled from, over which its logits are normalised.
            inputs: keyword arguments of the forward, without `labels`.

        Raises:
            ParallelError: the head did not run once, or other logits than its own came out of the model.
        """
        request = _Request(labels=labels, temperature=temperature, sampling_mask=sampling_mask, details=False)
        return self._score(model, request, inputs)[0]

    def scores(
        self,
        model: nn.Module,
        labels: Tensor,
        *,
        temperature: float = 1.0,
        sampling_mask: SamplingMask | None = None,
        **inputs: Any,
    ) -> TokenScores:
        """As `logprobs`, with entropy and top margin of each token's distribution."""
        request = _Request(labels=labels, temperature=temperature, sampling_mask=sampling_mask, details=True)
        return TokenScores(*self._score(model, request, inputs))

    def _score(self, model: nn.Module, request: _Request, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        if self._head.__dict__.get(_SLOT) is not self._activity:
            raise ParallelError("this handle was detached from its head: make another with r3.parallel.fused_head")
        request.engine_logprobs = self.engine_logprobs
        before, self._activity.request = self._activity.request, request
        try:
            carried = model(**inputs).logits
        finally:
            self._activity.request = before
        if request.found is None or carried.shape != (*request.labels.shape, 1) or not carried.dtype.is_floating_point:
            raise ParallelError(
                f"expected the head's {[*request.labels.shape, 1]} as logits of {type(model).__name__}, got "
                f"{list(carried.shape)}"
                + ("; its head did not run" if request.found is None else "; did an adapter wrap its head since?")
            )
        logprobs, *rest = request.found
        carried = carried[..., 0]
        return logprobs + (carried - carried.detach()), *rest


def fused_head(model: nn.Module) -> FusedHead:
    """Have `model`'s head score tokens by itself, when it is asked to, in place of returning logits.

    Nothing else changes: a forward that is called as usual returns logits. Attach it before `ulysses`, before or after
    FSDP2. What the model does to its head's product (a constant, a soft cap, a cut) is found out on a small copy.

    Args:
        model: a transformers model with a linear head, or a wrapper around one.

    Returns:
        A handle; `.detach()` undoes.

    Raises:
        ParallelError: a head that is no plain linear layer (one with LoRA, quantised), or a model that changes its
            logits in another way.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("examples/chain_sum_moe")
        >>> head = fused_head(model)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> head.logprobs(model, torch.tensor([[6, 7, -100]]), input_ids=ids).shape
        torch.Size([1, 3])
        >>> head.detach()
    """
    return FusedHead(model)


def _forward(self: Any, input: Tensor) -> Tensor:
    """A linear layer's forward, or the scores that are asked for. `self` may be a copy of the head."""
    activity: _Activity | None = self.__dict__.get(_SLOT)
    if activity is None or activity.head is not self or (activity.request is None and activity.before is None):
        return nn.Linear.forward(self, input)
    if activity.request is None:
        return activity.before(input)
    return _scored(self, input, activity.request, activity.after)


_forward.__name__ = "forward"  # a bound method is pickled by its name: a model that is loaded has nn.Linear's


def _scored(head: Any, hidden: Tensor, request: _Request, after: Any) -> Tensor:
    if request.found is not None:
        raise ParallelError("expected a model to run its head once in a forward, it ran it again")
    if hidden.shape[:-1] != request.labels.shape:
        raise ParallelError(
            f"labels: expected [B, S] = {list(hidden.shape[:-1])}, the positions of which the model computes logits, "
            f"got {list(request.labels.shape)}"
        )
    # Tensor parallelism splits the head over ranks that have the same tokens: each scores them with all of it.
    weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (head.weight, head.bias))
    if after.vocabulary < len(weight):
        weight, bias = weight[: after.vocabulary], bias if bias is None else bias[: after.vocabulary]
    logprobs, *rest = score(
        hidden,
        weight,
        request.labels,
        bias,
        Tempering.of(temperature=request.temperature, scale=after.scale, softcap=after.softcap),
        sampling_mask=request.sampling_mask,
        details=request.details,
    )
    if request.engine_logprobs is not None:
        if request.sampling_mask is not None:
            raise ParallelError("the engine's numerics score the whole vocabulary: expected no sampling_mask")
        flat = hidden.detach().flatten(0, -2), weight.detach(), request.labels.flatten()
        logprobs = with_value(logprobs, request.engine_logprobs(*flat, request.temperature).view(logprobs.shape))
    request.found = (logprobs.detach(), *rest)
    # Zeros, which scaling and a soft cap leave; only the gradient is carried, past the scale that comes.
    return (logprobs - logprobs.detach())[..., None] / after.scale


def _take_out(head: Any, before: Any) -> None:
    """Have `head` run `before` again, its own method before the handle, or its class's forward if that is None."""
    own = head.__dict__
    del own[_SLOT]
    for name in (BELOW_HOOK, "forward"):  # accelerate's hooks may have come or gone
        if getattr(own.get(name), "__func__", None) is not _forward:
            continue
        if before is not None:
            own[name] = before
        elif name == BELOW_HOOK:
            own[name] = MethodType(nn.Linear.forward, head)
        else:
            del own[name]


def _require_idle(model: Any, head: Any) -> None:
    """Refuse a head with a handle. What a copy of one has of it is taken out."""
    activity = None if head is None else head.__dict__.get(_SLOT)
    if activity is None:
        return
    if activity.head is head:
        raise ParallelError(f"{type(model).__name__}: its head has a handle already; use that one, or detach it first")
    _take_out(head, None)


def _require_linear(model: Any, head: Any) -> None:
    name = type(model).__name__
    if head is None:
        raise ParallelError(f"{name} has no output embeddings: it gives no log-probabilities")
    if not isinstance(head, nn.Linear) or code_of(head, "forward") is not nn.Linear.forward:
        raise ParallelError(
            f"{name}: expected a head with the forward of nn.Linear, got {type(head).__module__}."
            f"{type(head).__name__}. An adapter (LoRA) on it: leave the head out of target_modules, or merge it first. "
            f"{REMEDY}"
        )


def _transformers_model(model: nn.Module) -> Any:
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ParallelError(f"expected a transformers model or a wrapper around one, got {type(model).__name__}")
    return found
