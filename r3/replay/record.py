"""`record`: the trainer's own routing of a forward, in the type that replays it (R2)."""

from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ReplayError
from r3.replay.discovery import RouterSite, find_routers
from r3.replay.substitution import TopKRecorder
from r3.routing import RolloutRouting


class Recorder:
    """Records the experts that the routers choose while the context is open.

    Attributes:
        routing: `[B, S, L, K]` of the last forward, all rows valid, on the CPU.

    Example:
        >>> with r3.record(model) as recorder:                                              # doctest: +SKIP
        ...     model(input_ids=ids, use_cache=False)
        >>> recorder.routing                                                                # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites = find_routers(model)
        self._handles: list[Any] = []
        self._open: dict[int, TopKRecorder] = {}
        self._chosen: dict[int, tuple[int, Tensor]] = {}
        self._shape: tuple[int, ...] = ()

    @property
    def routing(self) -> RolloutRouting:
        missing = [site.name for site in self._sites if site.layer_id not in self._chosen]
        if missing:
            raise ReplayError(f"nothing recorded for {len(missing)} routers ({missing[0]}): run a forward first")
        columns = [self._chosen[site.layer_id] for site in self._sites]
        ids = torch.stack([ids for _, ids in columns], dim=1)
        return RolloutRouting(
            ids.reshape(*self._shape, *ids.shape[1:]).cpu(),
            torch.ones(self._shape, dtype=torch.bool),
            tuple(site.layer_id for site in self._sites),
            columns[0][0],
        )

    def __enter__(self) -> "Recorder":
        self._handles.append(self._model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for site in self._sites:
            enter, leave = self._hooks(site)
            self._handles.append(site.router.register_forward_pre_hook(enter))
            self._handles.append(site.router.register_forward_hook(leave, always_call=True))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if tokens is None:
            raise ReplayError("a forward to record needs input_ids or inputs_embeds")
        self._shape = tuple(tokens.shape[:2])
        self._chosen.clear()

    def _hooks(self, site: RouterSite):
        def enter(router: nn.Module, args: tuple) -> None:
            mode = self._open[site.layer_id] = TopKRecorder()
            mode.__enter__()

        def leave(router: nn.Module, args: tuple, output: Any) -> None:
            mode = self._open.pop(site.layer_id)
            mode.__exit__(None, None, None)
            if output is None:  # the router raised; its error is the one to show
                return
            if len(mode.calls) != 1:
                raise ReplayError(f"router {site.name}: expected one 2-D top-k in its forward, saw {len(mode.calls)}")
            num_experts, _, ids = mode.calls[0]
            self._chosen[site.layer_id] = (num_experts, ids.detach())

        return enter, leave


def record(model: nn.Module) -> Recorder:
    """Context manager that records the routing of `model`'s forwards; see `Recorder`."""
    return Recorder(model)
