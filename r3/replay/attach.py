"""`attach`: replay of recorded expert choices in a Hugging Face model, one keyword away."""

from typing import Any

import torch
from torch import Tensor, nn

from r3.errors import ReplayError, RoutingError
from r3.replay.adapters import say_adapted
from r3.replay.audit import require_all_replayed
from r3.replay.context import KEYWORD, ForwardReport, ReplayContext, tokens_of
from r3.replay.graph import mark_outputs
from r3.replay.padding import choosing_rows, padding_rows
from r3.replay.patching import ModelPatch
from r3.routing import RolloutRouting, RoutingSpec, routing_of
from r3.routing.positions import ModelInputs


class Replay:
    """The handle that `attach` returns.

    Attributes:
        spec: layers, experts and slots of the routing that it takes.
        last: report on the last forward of this thread, None if it was not replayed.
        required: whether a training-mode forward without routing is an error.
    """

    def __init__(self, model: nn.Module, required: bool) -> None:
        self.model = model
        self.required = required
        self._handles: list[Any] = []
        self._inputs = ModelInputs(model)
        self._patch = ModelPatch.of(model)
        try:
            if self._patch.replayed:
                raise ReplayError(f"replay is attached to this {type(model).__name__} already; detach it first")
            self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            self._handles.append(model.register_forward_hook(self._end, with_kwargs=True))
        except BaseException:
            self._patch.release()
            raise
        self._patch.replayed = True
        say_adapted(model, [router.site for router in self._patch.routers])

    @property
    def spec(self) -> RoutingSpec:
        return self._patch.spec

    @property
    def last(self) -> ForwardReport | None:
        return self._patch.activity.report

    def detach(self) -> None:
        """Take replay off the model, which is then as it was. A second call does nothing."""
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        self._patch.replayed = False
        self._patch.release()

    def routing(self, expert_ids: Tensor) -> RolloutRouting:
        """`RolloutRouting` of an integer tensor `[B, S, L, K]` in which rows of -1, also of some layers, are not valid.

        L counts the layers that have a router, or all decoder layers. Other marks for missing rows:
        `r3.routing.routing_of`.
        """
        return routing_of(self.spec, self.spec.columns(expert_ids))

    @torch.compiler.disable  # reads values, which would only break the graph
    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        activity = self._patch.activity
        activity.report, activity.fell_back = None, False
        argument = kwargs.get(KEYWORD)
        if argument is None:
            if self.required and model.training:
                raise ReplayError(
                    f"training forward of {type(model).__name__} without `{KEYWORD}`: replay is required. Pass the "
                    "routing of these tokens, or call model.eval() for a forward that is meant to be live"
                )
            return args, {name: value for name, value in kwargs.items() if name != KEYWORD}
        self._inputs.require_positions(kwargs)
        routing = argument if isinstance(argument, RolloutRouting) else self.routing(argument)
        tokens = tokens_of(args, kwargs)
        padding = padding_rows(kwargs, (tokens.shape[0], tokens.shape[1]))
        return args, {**kwargs, KEYWORD: self._call(routing, tokens, padding)}

    def _call(self, routing: RolloutRouting, tokens: Tensor, padding: Tensor | None) -> ReplayContext:
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
        if routing.layer_ids != spec.layer_ids:
            routing = routing.layers(spec.layer_ids)
        routing = routing.to(tokens.device, non_blocking=True)
        self._patch.to(tokens.device)
        ids, valid = routing.expert_ids.flatten(0, 1), routing.validity.flatten(0, 1)
        rows_live = len(ids) - routing.rows_valid
        live = None
        if rows_live:
            ids, live = choosing_rows(ids, ~valid, rows_live, padding, spec.num_experts)
        report = ForwardReport(
            rows_replayed=routing.rows_valid,
            rows_live=rows_live,
            pairs_replayed=routing.pairs_valid,
            pairs_live=len(ids) * len(spec.layer_ids) - routing.pairs_valid,
            routers=len(spec.layer_ids),
        )
        context = ReplayContext(ids, live, report)
        self._patch.contexts.add(context)
        return context

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call, activity = kwargs.get(KEYWORD), self._patch.activity
        if activity.fell_back and torch.is_grad_enabled():
            mark_outputs(output, activity, call)
        if call is None:
            return
        call.forward_id.open = False
        require_all_replayed(self._patch.routers, call)
        activity.report = call.report


def attach(model: nn.Module, *, required: bool = False) -> Replay:
    """Make `model` replay routing: `model(..., routed_experts=routing)`. Before or after FSDP2 wrapping.

    `routing` is a `RolloutRouting` or an integer tensor `[B, S, L, K]` in which rows of -1 are not valid; its `[B, S]`
    equals that of `input_ids`. Rows that are not valid are routed live, those that lack some layers in these alone. A
    forward without the keyword is not touched. One whose positions do not fit the images beside them raises: see
    "Images" in docs/reference/parallel.md.

    Args:
        model: a transformers model, or a wrapper around one.
        required: raise in a training-mode forward that brings no routing.

    Returns:
        A handle: `.last` reports on the last forward, `.detach()` undoes.

    Raises:
        UnsupportedModelError: no routers (a dense model), or routers that cannot be replayed exactly, by name.
        ReplayError: replay is attached already.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("examples/chain_sum_moe")  # 8 layers, 4 of 32 experts
        >>> replay = attach(model)
        >>> ids, routing = torch.tensor([[5, 6, 7]]), torch.arange(4).expand(1, 3, 8, 4)
        >>> out = model(input_ids=ids, routed_experts=routing, use_cache=False)
        >>> replay.last.rows_replayed
        3
    """
    return Replay(model, required)
