"""Replay and recording patch a model in the same way: they extend the classes of its decoder layers and routers.

The class of each is replaced by a subclass, as FSDP2 does. A layer's `forward` removes the keyword `routed_experts` and
makes its call the current one of this thread while the layer runs; the router's method looks it up. Because this
happens inside `forward`, gradient checkpointing, which repeats the call with its keywords, repeats it with the same
ids. If only a part of a layer is recomputed, the layer's autograd graph tells which call it was (`r3.replay.graph`).
"""

import threading
import weakref

import torch
from torch import Tensor, nn

from r3.errors import ReplayError, UnsupportedModelError
from r3.own_methods import Moved, method_of
from r3.replay.context import KEYWORD, Activity, Carrier, ForwardId, ReplayContext
from r3.replay.discovery import RouterMap, RouterSite, find_routers
from r3.replay.graph import UNMARKED, evaluated_node, mark_inputs, mark_outputs, nearest_mark, packs_for_repeat
from r3.replay.proof import prove_all
from r3.replay.spread import require_right
from r3.replay.topk import Choice, TopKSubstitution
from r3.routing import RoutingSpec
from r3.wrappers import FLATTENED, flattened

_MODEL = "_r3_patch"
_ROUTER = "_r3_router"
_EXTENDS = "_r3_extends"  # of a class: the method


class _LastCall(threading.local):
    """The call that a router replayed last in the current thread."""

    def __init__(self) -> None:
        self.forward_id: ForwardId | None = None

    def __reduce__(self):
        return type(self), ()


class RouterPatch:
    """The patch that a router's method finds on its module.

    torch.compile traces `run` once for all layers: what differs between them is a tensor or passed on unread.

    Attributes:
        site: the router.
        index: its column in the ids of a call; `column` is the same as a tensor `[1]`.
        choice: the `topk` call by which it selects experts.
        last: id of the forward that it replayed last.
        replays: whether it has ever replayed a forward.
    """

    def __init__(self, site: RouterSite, index: int, choice: Choice, activity: Activity) -> None:
        self.site = site
        self.index = index
        self.column = torch.tensor([index], device="cpu")
        self.choice = choice
        self.last = _LastCall()
        self.last_compiled: ForwardId | None = None
        self.replays = False
        self._activity = activity

    def replayed(self, call: ReplayContext) -> bool:
        """Whether `call` is the last one that this router replayed, in this thread."""
        return self.last.forward_id is call.forward_id or self.last_compiled is call.forward_id

    def _call(self) -> ReplayContext | None:
        call = self._activity.current
        if call is None or isinstance(call, ReplayContext):
            return call
        return self._repeated(compiled=torch.compiler.is_compiling())

    @torch.compiler.disable
    def _repeated(self, *, compiled: bool) -> ReplayContext | None:
        """The call of the forward that a backward pass is recomputing in part; None outside of that."""
        node = evaluated_node()
        call = None if node is None else nearest_mark(node, self._activity)
        lost = call is UNMARKED and (self.replays or self.last_compiled is not None)
        # The graph break of the lookup would make a graph other than that of the forward, which saves other tensors.
        differs = isinstance(call, ReplayContext) and compiled and packs_for_repeat()
        if lost or differs:
            why = "which torch.compile has compiled" if differs else "and nothing says which forward it is of"
            raise ReplayError(
                f"router {self.site.name} is repeated in a backward pass, by checkpointing around a part of decoder "
                f"layer {self.site.layer_id}, {why}. Wrap the decoder layer in place of a part of it "
                "(model.gradient_checkpointing_enable() does)"
            )
        return call if isinstance(call, ReplayContext) else None

    def _note(self, forward: ForwardId) -> None:
        self.replays = True
        if torch.compiler.is_compiling():
            self.last_compiled = forward
        elif forward is self.last.forward_id and forward.open:
            raise ReplayError(
                f"router {self.site.name} was replayed twice in one forward: expected a decoder layer to run once, as "
                "routing has one column for it"
            )
        else:
            self.last.forward_id = forward

    def _mine(self, of_layers: Tensor) -> Tensor:
        """This router's `[T, ...]` of `[T, L, ...]`."""
        if torch.compiler.is_compiling():
            return of_layers.index_select(1, self.column).squeeze(1)
        return of_layers[:, self.index]

    def run(self, original, module: nn.Module, args: tuple, kwargs: dict):
        """Run `original`, the router's method of `module`, under the call and the recording of this thread."""
        call, recording = self._call(), self._activity.recording
        if call is None and recording is None:
            return original(module, *args, **kwargs)
        ids = live = None
        if call is not None:
            ids, live = self._mine(call.ids), call.live
            if live is not None and live.dim() == 2:
                live = self._mine(live)
        margins = recording.margins if recording is not None else None
        mode = TopKSubstitution(self.choice, ids, live, self.site, margins=margins is not None)
        with mode:
            output = original(module, *args, **kwargs)
        if mode.count != 1 or mode.chosen is None:
            raise ReplayError(
                f"router {self.site.name}: expected one top-k over {self.choice.num_experts} experts where it chooses, "
                f"saw {mode.count}; its code has been replaced or takes another path than the one proved at attach"
            )
        if call is not None:
            self._note(call.forward_id)
        if recording is not None:
            if self.index in recording.chosen:
                raise ReplayError(
                    f"router {self.site.name} chose twice in one forward: expected a decoder layer to run once, as "
                    "routing has one column for it"
                )
            recording.chosen[self.index] = mode.chosen.detach()
        if margins is not None and mode.margin is not None:
            margins[self.index] = mode.margin
        return output


class ModelPatch:
    """The extended classes of one model; `users` are the replay and the recorders that need them.

    Attributes:
        spec: layers, experts and slots of the routing that describes the model.
        routers: its routers, by ascending decoder layer.
        activity: its state in the current thread.
        replayed: whether replay is one of the users.
        contexts: of forwards that may run again: gradient checkpointing holds on to them until the backward pass.
    """

    def __init__(self, routers: RouterMap) -> None:
        choices = prove_all(routers.sites)
        self.activity = Activity()
        self.routers = [
            RouterPatch(site, index, choice, self.activity)
            for index, (site, choice) in enumerate(zip(routers.sites, choices, strict=True))
        ]
        self.spec = RoutingSpec(
            layer_ids=tuple(site.layer_id for site in routers.sites),
            num_layers=len(routers.layers),
            num_experts=choices[0].num_experts,
            top_k=choices[0].top_k,
            table_layers=routers.table_layers,
        )
        self.users = 0
        self.replayed = False
        self.contexts: weakref.WeakSet[ReplayContext] = weakref.WeakSet()
        self._layers = routers.layers
        self._changed: list[tuple[nn.Module, str, type[nn.Module], type[nn.Module], Moved]] = []

    @classmethod
    def of(cls, model: nn.Module) -> "ModelPatch":
        """The patch of `model`, with one more user.

        Raises:
            UnsupportedModelError: no routers, or routers that cannot be replayed exactly, or a family that transformers
                gets wrong as it spreads it over ranks, by name.
        """
        require_right(model)
        routers = find_routers(model)
        patch = routers.layers[0].__dict__.get(_MODEL)
        if patch is None:
            if flattened(model):
                raise UnsupportedModelError(FLATTENED)
            patch = cls(routers)
            try:
                patch._install()
            except BaseException:
                patch._remove()
                raise
        patch.users += 1
        return patch

    def to(self, device: torch.device) -> None:
        """Move tensors that compiled code reads to `device`."""
        for router in self.routers:
            if router.column.device != device:
                router.column = router.column.to(device)

    def release(self) -> None:
        """Remove one user; the last one restores the model."""
        self.users -= 1
        if not self.users:
            self._remove()

    def _install(self) -> None:
        extended: dict[tuple[type, str], type[nn.Module]] = {}

        def change(module: nn.Module, method: str, extend, key: str, value: object) -> None:
            after = _extension_of(type(module), method)  # that an earlier attach left, or FSDP2 has subclassed
            before = type(module) if after is None else after.__bases__[0]
            if after is None:
                if (before, method) not in extended:
                    extended[before, method] = extend(before, method)
                after = extended[before, method]
            moved = Moved(module, method, before, after)
            self._changed.append((module, key, before, after, moved))
            module.__dict__[key] = value
            if not isinstance(module, after):
                module.__class__ = after

        for layer in self._layers:
            change(layer, "forward", _patched_layer, _MODEL, self)
        for router in self.routers:
            change(router.site.owner, router.site.method, _patched_router, _ROUTER, router)

    def _remove(self) -> None:
        while self._changed:
            module, key, before, extended, moved = self._changed.pop()
            module.__dict__.pop(key, None)
            moved.put_back(module)
            # From here on our class only calls through. It stays where FSDP2 has subclassed it, and where a layer may
            # run again: transformers up to 5.17 repeats it through its class, which swallows an unknown keyword.
            if type(module) is extended and not self.contexts:
                module.__class__ = before


def _subclass(cls: type[nn.Module], method: str, replacement) -> type[nn.Module]:
    names = {
        method: replacement,
        _EXTENDS: method,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    replacement.extended = extended = type(cls.__name__, (cls,), names)
    return extended


def _extension_of(cls: type, method: str) -> type | None:
    """The class that `_subclass` made for `method` among `cls` and its bases."""
    return next((base for base in cls.__mro__ if vars(base).get(_EXTENDS) == method), None)


def _patched_layer(cls: type[nn.Module], method: str) -> type[nn.Module]:
    """Subclass of a decoder layer's class whose forward removes the keyword and makes its call the current one."""

    def forward(self, *args, **kwargs):
        call = kwargs.pop(KEYWORD, None)
        original = method_of(cls.forward, extended, self)
        # Without replay, or with another one attached since, it only calls through.
        patch: ModelPatch | None = self.__dict__.get(_MODEL) if isinstance(self, extended) else None
        if patch is None and call is None:
            return original(self, *args, **kwargs)
        if patch is None:
            raise ReplayError(
                f"`{KEYWORD}` reached a decoder layer from which replay was detached. Detach it after the backward pass"
            )
        if call is not None and not isinstance(call, ReplayContext):
            raise ReplayError(
                f"`{KEYWORD}` reached a decoder layer as {type(call).__name__}: it went past the module that replay is "
                "attached to. Call that module, or attach to the one that is called"
            )
        activity = patch.activity
        if torch.compiler.is_compiling():
            with Carrier(activity, call):
                return original(self, *args, **kwargs)
        marked = True
        if torch.is_grad_enabled():
            args, kwargs, marked = mark_inputs(args, kwargs, activity, call)
        outer, activity.call = activity.call, call
        try:
            output = original(self, *args, **kwargs)
        finally:
            activity.call = outer
        if not marked:
            mark_outputs(output, activity, call)
        return output

    extended = _subclass(cls, method, forward)
    return extended


def _patched_router(cls: type[nn.Module], method: str) -> type[nn.Module]:
    """Subclass of a router's class whose `method` takes the ids of the current call."""

    def choose(self, *args, **kwargs):
        original = method_of(getattr(cls, method), extended, self)
        router: RouterPatch | None = self.__dict__.get(_ROUTER) if isinstance(self, extended) else None
        if router is None:
            return original(self, *args, **kwargs)
        return router.run(original, self, args, kwargs)

    extended = _subclass(cls, method, choose)
    return extended
