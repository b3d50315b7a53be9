"""`attach`: replay of recorded expert choices in a Hugging Face model, one keyword away.

The keyword `routed_experts` travels with the others from the model's forward to its decoder layers. Each layer's
`forward` is extended, by a subclass as FSDP2 does it, to take the keyword out and to hand its ids to the layer's
router for as long as the layer runs. Because this happens inside `forward`, gradient checkpointing, which saves and
repeats the call of `forward` with its keywords, repeats it with the same ids, whatever ran in between.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from r3.errors import ReplayError, RoutingError, UnsupportedModelError, summary
from r3.replay.discovery import RouterSite, find_routers
from r3.replay.proof import prove
from r3.replay.substitution import TopKSubstitution
from r3.routing import RolloutRouting, RoutingSpec

KEYWORD = "routed_experts"
_SLOT = "_r3_slot"


@dataclass(frozen=True, kw_only=True)
class ForwardReport:
    """What one replayed forward did: rows (tokens) replayed, rows routed live, routers that fired."""

    rows_replayed: int
    rows_live: int
    routers: int


class _Call:
    """The routing of one forward, on its way to the layers.

    Not a dataclass: FSDP2 copies those when it casts a forward's inputs, and the layers would count on copies.
    """

    def __init__(self, ids: Tensor, valid: Tensor | None, columns: dict[int, int], rows_replayed: int) -> None:
        self.ids = ids  # [T, L, K] compact
        self.valid = valid  # [T] bool, None if all rows are valid
        self.columns = columns
        self.rows_replayed = rows_replayed
        self.fired: Counter[int] = Counter()


@dataclass(eq=False)
class _Slot:
    """Hands a call's ids from a decoder layer to its router."""

    site: RouterSite
    num_experts: int
    call: _Call | None = None
    mode: TopKSubstitution | None = None

    def enter_router(self, router: nn.Module, args: tuple) -> None:
        if self.call is None:
            return
        ids = self.call.ids[:, self.call.columns[self.site.layer_id]].long()
        self.mode = TopKSubstitution(ids, self.call.valid, self.num_experts)
        self.mode.__enter__()

    def leave_router(self, router: nn.Module, args: tuple, output: Any) -> None:
        if self.mode is None or self.call is None:
            return
        mode, self.mode = self.mode, None
        mode.__exit__(None, None, None)
        if output is None:  # the router raised; its error is the one to show
            return
        if mode.count != 1:
            raise ReplayError(
                f"router {self.site.name}: expected one top-k over {self.num_experts} experts in its forward, "
                f"saw {mode.count}; its forward has been replaced or takes another path than the one proved at attach"
            )
        self.call.fired[self.site.layer_id] += 1


def _replaying(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a decoder layer's class whose forward takes the keyword out and sets its ids on the router."""

    def forward(self, *args, **kwargs):
        slot: _Slot | None = self.__dict__.get(_SLOT)
        call: _Call | None = kwargs.pop(KEYWORD, None)
        if slot is None or call is None:
            return cls.forward(self, *args, **kwargs)
        outer, slot.call = slot.call, call
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            slot.call = outer

    names = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), names)


class Replay:
    """The handle that `attach` returns.

    Attributes:
        spec: layers, experts and slots of the routing that it takes.
        last: what the last forward did, None if it was not replayed.
        required: whether a training-mode forward without routing is an error.
    """

    def __init__(self, model: nn.Module, sites: list[RouterSite], num_experts: int, top_k: int, required: bool) -> None:
        self.model = model
        self._layers = _layer_list(model, sites)
        self.spec = RoutingSpec(
            layer_ids=tuple(site.layer_id for site in sites),
            num_layers=len(self._layers),
            num_experts=num_experts,
            top_k=top_k,
        )
        self.required = required
        self.last: ForwardReport | None = None
        self._sites = sites
        self._handles: list[Any] = []
        self._classes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []

    def detach(self) -> None:
        """Take replay off the model, which is then as it was. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._classes:
            layer, before, replaying = self._classes.pop()
            layer.__dict__.pop(_SLOT, None)
            # FSDP2 applied after attach has subclassed ours, which then only passes on.
            if type(layer) is replaying:
                layer.__class__ = before

    def routing(self, expert_ids: Tensor) -> RolloutRouting:
        """`RolloutRouting` of an integer tensor `[B, S, L, K]` in which rows of -1 are not valid.

        L counts the layers that have a router, or all decoder layers, of which those without a router are dropped.
        """
        columns = expert_ids.shape[2] if expert_ids.dim() == 4 else -1
        layer_ids, num_layers = self.spec.layer_ids, self.spec.num_layers
        if columns == num_layers != len(layer_ids):
            expert_ids = expert_ids[:, :, list(layer_ids)]
        elif columns != len(layer_ids):
            raise RoutingError(
                f"{KEYWORD}: expected [B, S, L, K] with L = {len(layer_ids)} layers that have a router (or all "
                f"{num_layers} decoder layers), got {tuple(expert_ids.shape)}"
            )
        valid = ~(expert_ids == -1).flatten(2).all(-1)
        return RolloutRouting(expert_ids, valid, layer_ids, self.spec.num_experts)

    def _install(self) -> None:
        slots = {id(site.layer): _Slot(site, self.spec.num_experts) for site in self._sites}
        subclasses: dict[type[nn.Module], type[nn.Module]] = {}
        for layer in self._layers:
            before = type(layer)
            if before not in subclasses:
                subclasses[before] = _replaying(before)
            replaying = subclasses[before]
            layer.__dict__[_SLOT] = slots.get(id(layer))
            layer.__class__ = replaying
            self._classes.append((layer, before, replaying))
        for slot in slots.values():
            router = slot.site.router
            self._handles.append(router.register_forward_pre_hook(slot.enter_router))
            self._handles.append(router.register_forward_hook(slot.leave_router, always_call=True))
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        self._handles.append(self.model.register_forward_hook(self._end, with_kwargs=True))

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.last = None
        given = kwargs.get(KEYWORD)
        if given is None:
            if self.required and model.training:
                raise ReplayError(
                    f"training forward of {type(model).__name__} without `{KEYWORD}`: replay is required. Pass the "
                    "routing of these tokens, or call model.eval() for a forward that is meant to be live"
                )
            return args, {name: value for name, value in kwargs.items() if name != KEYWORD}
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if tokens is None:
            raise ReplayError(f"`{KEYWORD}` given, but neither input_ids nor inputs_embeds")
        routing = given if isinstance(given, RolloutRouting) else self.routing(given)
        return args, {**kwargs, KEYWORD: self._call(routing, tokens)}

    def _call(self, routing: RolloutRouting, tokens: Tensor) -> _Call:
        spec = self.spec
        expected = (*tokens.shape[:2], len(spec.layer_ids), spec.top_k)
        missing = sorted(set(spec.layer_ids) - set(routing.layer_ids))
        got = (*routing.shape[:2], len(spec.layer_ids) - len(missing), routing.shape[3])
        if got != expected or routing.num_experts != spec.num_experts:
            raise RoutingError(
                f"{KEYWORD}: expected [B, S, L, K] = {expected} of {spec.num_experts} experts for input of "
                f"{tuple(tokens.shape[:2])}, got {got} of {routing.num_experts} experts"
                + (f"; no routing for decoder layers {missing}" if missing else "")
            )
        replayed = int(routing.valid.sum())
        routing = routing.to(tokens.device, non_blocking=True)
        return _Call(
            ids=routing.expert_ids.flatten(0, 1),
            valid=None if replayed == routing.valid.numel() else routing.valid.flatten(),
            columns={layer: column for column, layer in enumerate(routing.layer_ids)},
            rows_replayed=replayed,
        )

    def _end(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call = kwargs.get(KEYWORD)
        if call is None:
            return
        wrong = [f"{site.name}: {call.fired[site.layer_id]}" for site in self._sites if call.fired[site.layer_id] != 1]
        if wrong:
            raise ReplayError(
                "expected every router to be replayed once in a forward. A router that did not run is bypassed by a "
                f"replaced block (use_kernels=True, for one). Times replayed:{summary(wrong)}"
            )
        self.last = ForwardReport(
            rows_replayed=call.rows_replayed,
            rows_live=len(call.ids) - call.rows_replayed,
            routers=len(self._sites),
        )


def _layer_list(model: nn.Module, sites: list[RouterSite]) -> list[nn.Module]:
    """All decoder layers beside those that have a router, in order."""
    wanted = {id(site.layer) for site in sites}
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            layers = [_unwrapped(layer, wanted) for layer in module]
            if wanted <= {id(layer) for layer in layers}:
                return layers
    raise UnsupportedModelError("expected all routers in one list of decoder layers, found them in several")


def _unwrapped(layer: nn.Module, wanted: set[int]) -> nn.Module:
    return next((inner for inner in layer.modules() if id(inner) in wanted), layer)


def attach(model: nn.Module, *, required: bool = False) -> Replay:
    """Make `model` replay routing: `model(..., routed_experts=routing)`. Before or after FSDP2 wrapping.

    `routing` is a `RolloutRouting` or an integer tensor `[B, S, L, K]` in which rows of -1 are not valid; its `[B, S]`
    equals that of `input_ids`. Rows that are not valid are routed live. A forward without the keyword is not touched.

    Args:
        model: a transformers model, or a wrapper around one.
        required: raise in a training-mode forward that brings no routing.

    Returns:
        A handle: `.last` tells what the last forward did, `.detach()` undoes.

    Raises:
        UnsupportedModelError: no routers (a dense model), or routers that cannot be replayed exactly, by name.
        ReplayError: replay is attached already.

    Example:
        >>> replay = r3.attach(model)                                                       # doctest: +SKIP
        >>> out = model(input_ids=ids, routed_experts=routing, use_cache=False)             # doctest: +SKIP
    """
    sites = find_routers(model)
    taken = [site.name for site in sites if _SLOT in site.layer.__dict__]
    if taken:
        raise ReplayError(f"replay is attached to this model already; detach it first. Routers:{summary(taken)}")
    proved: dict[tuple, tuple[int, int]] = {}
    sizes = set()
    for site in sites:
        shapes = (type(site.router), tuple((n, tuple(p.shape), p.dtype) for n, p in site.router.named_parameters()))
        if shapes not in proved:
            proved[shapes] = prove(site.router, site.name)
        sizes.add(proved[shapes])
    if len(sizes) != 1:
        raise UnsupportedModelError(f"expected one (experts, top_k) for all layers, found {sorted(sizes)}")
    ((num_experts, top_k),) = sizes
    replay = Replay(model, sites, num_experts, top_k, required)
    try:
        replay._install()
    except BaseException:
        replay.detach()
        raise
    return replay


__all__ = ["ForwardReport", "Replay", "attach"]
