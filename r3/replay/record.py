"""`record`: the trainer's own routing of a forward, in the type that replays it (R2)."""

from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ReplayError, summary
from r3.replay.instrument import Instrument, tokens_of
from r3.routing import RolloutRouting


class Recorder:
    """Records the experts that the routers choose in each forward while the context is open.

    Of a replayed forward it records what was replayed. A layer that checkpointing repeats is not recorded again.

    Attributes:
        routing: `[B, S, L, K]` of the last forward, all rows valid, on the CPU.

    Example:
        >>> with r3.record(model) as recorder:                                              # doctest: +SKIP
        ...     model(input_ids=ids, use_cache=False)
        >>> recorder.routing                                                                # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._instrument: Instrument | None = None
        self._handles: list[Any] = []
        self._shape: tuple[int, int] | None = None
        self._chosen: list[Tensor] = []
        self._routing: RolloutRouting | None = None

    @property
    def routing(self) -> RolloutRouting:
        if self._shape is None:
            raise ReplayError("nothing recorded: run a forward of the model inside the context first")
        if self._routing is None:
            spec = self._spec
            ids = torch.stack(self._chosen, dim=1).to("cpu")
            self._routing = RolloutRouting(
                ids.view(*self._shape, *ids.shape[1:]),
                torch.ones(self._shape, dtype=torch.bool),
                spec.layer_ids,
                spec.num_experts,
            )
        return self._routing

    def __enter__(self) -> "Recorder":
        self._instrument = Instrument.of(self._model)
        self._spec = self._instrument.spec
        self._handles = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._instrument is not None:
            self._instrument.activity.tape = None
            self._instrument.release()
            self._instrument = None

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple) -> None:
        assert self._instrument is not None
        self._instrument.activity.tape = {}

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        assert self._instrument is not None
        tape, self._instrument.activity.tape = self._instrument.activity.tape, None
        if output is None or tape is None:  # the forward raised
            return
        missing = [chooser.site.name for chooser in self._instrument.choosers if chooser.index not in tape]
        if missing:
            raise ReplayError(f"expected every router to choose in a forward; these did not run:{summary(missing)}")
        batch, length = tokens_of(args, kwargs).shape[:2]
        self._shape = (batch, length)
        self._chosen = [tape[index].flatten(0, -2) for index in sorted(tape)]
        self._routing = None


def record(model: nn.Module) -> Recorder:
    """Context manager that records the routing of `model`'s forwards; see `Recorder`.

    Raises:
        UnsupportedModelError: no routers, or routers that cannot be replayed exactly, by name.
    """
    return Recorder(model)
