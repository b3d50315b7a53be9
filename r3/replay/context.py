"""What one forward carries to the layers and routers of a patched model, and what they leave behind."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from r3.errors import ReplayError

KEYWORD = "routed_experts"


def tokens_of(args: tuple, kwargs: dict) -> Tensor:
    """`input_ids` `[B, S]` or `inputs_embeds` `[B, S, H]` of a model's forward."""
    tokens = next((kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
    if tokens is None:
        tokens = args[0] if args else None
    if tokens is None:
        raise ReplayError("expected input_ids or inputs_embeds in a forward that is replayed or recorded, got neither")
    return tokens


@dataclass(frozen=True, kw_only=True)
class ForwardReport:
    """Report on one replayed forward.

    Attributes:
        rows_replayed: rows (tokens) replayed in every layer.
        rows_live: the other rows: routed live, or padding, which is spread over the experts.
        pairs_replayed, pairs_live: the same by (token, layer): rows that lack some layers are replayed in the others.
        routers: number of routers that ran.
    """

    rows_replayed: int
    rows_live: int
    pairs_replayed: int
    pairs_live: int
    routers: int


class ReplayContext:
    """The routing of one forward, on its way to the layers.

    Not a dataclass: FSDP2 copies those when it casts a forward's inputs, and the layers would count on copies.

    Attributes:
        ids: integer `[T, L, K]`, a column for each router of the model.
        live: int64 `[R]`, the rows that are routed live, some perhaps repeated, or None if there are none; bool
            `[T, L]` where layers differ.
        report: the forward's report, complete when all routers have replayed it.
        forward_id: kept by routers that replayed it; keeping the context itself would keep its ids in memory.
    """

    def __init__(self, ids: Tensor, live: Tensor | None, report: ForwardReport) -> None:
        self.ids = ids
        self.live = live
        self.report = report
        self.forward_id = ForwardId()


class ForwardId:
    """Identity of a forward; `open` until it has ended (checkpointing repeats layers afterwards)."""

    def __init__(self) -> None:
        self.open = True


class RecordedForward:
    """The recording of one forward, by column of a router.

    Attributes:
        readers: the recorders that want it.
        chosen: int64 `[..., K]`, the ids that each router selected.
        margins: float32 `[T]`, margin of each live choice; None if no reader asked.
    """

    def __init__(self) -> None:
        self.readers: set[object] = set()
        self.chosen: dict[int, Tensor] = {}
        self.margins: dict[int, Tensor] | None = None


class Outside:
    """The current call while no layer runs."""


class Activity(threading.local):
    """State of a model in this thread: the current call (None if it is live), the recording, and the last report.

    A copy of it, as `copy.deepcopy` of a patched model makes, is idle.
    """

    def __init__(self) -> None:  # threading.local runs it in each thread
        self.call: ReplayContext | type[Outside] | None = Outside
        self.recording: RecordedForward | None = None
        self.report: ForwardReport | None = None
        self.fell_back = False  # whether a router ran in eager code inside a compiled layer

    def __reduce__(self):
        return type(self), ()

    @property
    def current(self) -> ReplayContext | type[Outside] | None:
        """The call whose layer runs."""
        if self.call is Outside:
            for mode in _get_current_function_mode_stack():
                if isinstance(mode, Carrier) and mode.activity is self:
                    if not torch.compiler.is_compiling():
                        self.fell_back = True
                    return mode.call
        return self.call


class Carrier(TorchFunctionMode):
    """Carries the current call through code that torch.compile traces.

    Its writes to a `threading.local` are lost at a graph break; the stack of modes is restored. (In eager code a mode
    would cost a Python call for each operation of the layer.)
    """

    def __init__(self, activity: Activity, call: ReplayContext | None) -> None:
        super().__init__()
        self.activity = activity
        self.call = call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
