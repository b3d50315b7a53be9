"""`record`: the trainer's own routing of a forward, in the type that replays it (R2)."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ReplayError, summary
from r3.replay.context import Activity, RecordedForward, tokens_of
from r3.replay.patching import ModelPatch
from r3.routing import RolloutRouting, check_rows, compact_dtype
from r3.routing.positions import ModelInputs
from r3.routing.types import trusted


class Recorder:
    """Records the experts that the routers choose in each forward of this thread while the context is open.

    Of a replayed forward it records what was replayed. A layer that checkpointing repeats is not recorded again.
    Recorders of one model may be nested, and open in several threads: each has what ran in its context.

    Attributes:
        routing: `[B, S, L, K]` of the last forward, all rows valid, on the CPU.
        expert_ids: the ids of `routing`, where the model is.
        margins: float32 `[B, S, L]` of the last forward, where the model is, if asked for: the score of the K-th best
            expert minus that of the K+1-th, at least 0, in the scores that the router's own top-k sees: with the
            selection bias (`e_score_correction_bias`), and masked by a group limit. Infinite where no other expert
            could have been chosen, as with K = E.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("examples/chain_sum_moe")
        >>> with record(model) as recorder:
        ...     out = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        >>> recorder.routing.shape  # 1 sequence, 3 tokens, 8 layers, 4 of 32 experts
        (1, 3, 8, 4)
    """

    def __init__(self, model: nn.Module, *, margins: bool = False) -> None:
        self._model = model
        self._with_margins = margins
        self._patch: ModelPatch | None = None
        self._handles: list[Any] = []
        self._inputs = ModelInputs(model)
        self._given = (0, 0)
        self._shape: tuple[int, int] | None = None
        self._chosen: list[Tensor] = []
        self._margins: list[Tensor] = []
        self._routing: RolloutRouting | None = None
        self._thread: int | None = None

    @property
    def routing(self) -> RolloutRouting:
        if self._routing is None:
            ids = self.expert_ids.to("cpu")
            valid = torch.ones(ids.shape[:2], dtype=torch.bool)
            check_rows(ids, valid, self._spec.layer_ids, self._spec.num_experts)
            self._routing = trusted(ids, valid, self._spec.layer_ids, self._spec.num_experts, None)
        return self._routing

    @property
    def expert_ids(self) -> Tensor:
        return self._by_token(self._chosen).to(compact_dtype(self._spec.num_experts))

    @property
    def margins(self) -> Tensor:
        if not self._with_margins:
            raise ReplayError("no margins were recorded: ask for them with r3.record(model, margins=True)")
        if self._shape is not None and not self._margins:
            raise ReplayError(
                "margins: expected a live forward, got a replayed one, which makes no choice of its own; run a forward "
                "without `routed_experts`"
            )
        return self._by_token(self._margins)

    def _by_token(self, layers: list[Tensor]) -> Tensor:
        """`[T, ...]` of each layer -> `[B, S, L, ...]`."""
        if self._shape is None:
            raise ReplayError(
                "nothing recorded: run a forward of the model inside the context first, in the thread that opened it"
            )
        return torch.stack(layers, dim=1).unflatten(0, self._shape)

    def __enter__(self) -> "Recorder":
        if self._patch is not None:
            raise ReplayError("this recorder is open already: use another r3.record(model) inside it")
        self._patch = ModelPatch.of(self._model)
        self._spec = self._patch.spec
        self._thread = threading.get_ident()
        self._handles = [
            # Runs first, to see the caller's tokens: Ulysses attention may widen them to whole rows.
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._patch is not None:
            self._leave(self._patch.activity)
            self._patch.release()
            self._patch = None

    def _leave(self, activity: Activity) -> RecordedForward | None:
        """The recording of this recorder, which ends with its last reader."""
        recording = activity.recording
        if recording is None or self not in recording.readers:
            return None
        recording.readers.remove(self)
        if not recording.readers:
            activity.recording = None
        return recording

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        assert self._patch is not None
        if threading.get_ident() != self._thread:
            return
        batch, length = tokens_of(args, kwargs).shape[:2]
        self._given = (batch, length)
        activity = self._patch.activity
        # A recording that already has this recorder is left from an interrupted forward.
        if activity.recording is None or self in activity.recording.readers:
            activity.recording = RecordedForward()
        activity.recording.readers.add(self)
        if self._with_margins and activity.recording.margins is None:
            activity.recording.margins = {}

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        assert self._patch is not None
        recording = self._leave(self._patch.activity)
        if output is None or recording is None:  # the forward raised, or is another thread's
            return
        self._inputs.require_positions(kwargs)
        missing = [router.site.name for router in self._patch.routers if router.index not in recording.chosen]
        if missing:
            raise ReplayError(f"expected every router to choose in a forward; these did not run:{summary(missing)}")
        self._shape = self._given
        self._chosen = [recording.chosen[index].flatten(0, -2) for index in sorted(recording.chosen)]
        margins = recording.margins if self._with_margins and recording.margins is not None else {}
        # In a live forward all layers have a margin.
        self._margins = [margins[index] for index in sorted(margins)]
        self._routing = None


def record(model: nn.Module, *, margins: bool = False) -> Recorder:
    """Context manager that records the routing of `model`'s forwards; see `Recorder`.

    With `margins` it also records how close each live choice was, for one more top-k a router.

    Raises:
        UnsupportedModelError: no routers, or routers that cannot be replayed exactly, by name.
    """
    return Recorder(model, margins=margins)
