"""A stock Hugging Face model whose forward has the values of a batch-invariant engine, and its own gradients.

Each block (norm, attention, router, experts, MLP) runs as transformers wrote it. Then the engine's kernels compute the
block again from the same input, and their result takes the place of its output, whose gradient stays. So what flows on
is what flows on in the engine, and log-probabilities are the engine's to the last bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from r3.engine_value import with_value
from r3.errors import ReplayError, UnsupportedModelError
from r3.vllm_compat import kernels

if TYPE_CHECKING:
    from r3.parallel import FusedHead

MODEL_TYPES = ("qwen3", "qwen3_moe", "glm4_moe")
"""Whose blocks this is written for. What was seen of them: docs/reference/numerics.md."""
_MATCHED = "_r3_matched"
MOST_APART = 0.03
"""Relative error at which a block computes something else than the engine's kernel: rounding makes 0.01 at most."""


class _Sequences:
    """Where the sequences of a batch lie, end to end: found once for all layers, by their position ids."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._at = (0, 0)  # rows, and version of the positions, which may be written anew
        self.bounds, self.longest = torch.empty(0), 0

    def find(self, positions: Tensor, rows: int) -> None:
        """Sequences of `rows` rows with positions `[B, S]` or `[1, S]`; one begins where its position is 0."""
        at = (rows, -1 if positions.is_inference() else positions._version)  # those of inference mode have no version
        if self._of is not None and self._of() is positions and self._at == at and at[1] >= 0:
            return
        begins = (positions == 0).expand(rows, -1).clone()
        begins[:, 0] = True
        starts = begins.flatten().nonzero()[:, 0]
        self.bounds = torch.cat((starts, starts.new_tensor([begins.numel()]))).int()
        self.longest = int(self.bounds.diff().max())
        self._of, self._at = weakref.ref(positions), at


class MatchedModel:
    """The handle that `match_engine` returns.

    Attributes:
        unchecked: names of blocks whose first forward, in which they are compared with their own result, is to come.
    """

    def __init__(self, model: nn.Module, head: FusedHead | None) -> None:
        kernels.require_prepared()
        inner = _transformers_model(model)
        _require_known(inner)
        self.unchecked: set[str] = set()
        self._hooks: list[Any] = []
        self._head = head
        self._sequences = _Sequences()
        config, decoder = inner.config, inner.get_decoder()
        if _MATCHED in decoder.__dict__:
            raise ReplayError("the engine's numerics are attached to this model already; detach that handle first")
        self._scale = config.head_dim**-0.5
        self._rotation = kernels.rotation(
            config.head_dim, config.max_position_embeddings, dict(config.rope_parameters), torch.bfloat16
        )
        self._decoder = decoder
        decoder.__dict__[_MATCHED] = self
        self._hooks.append(decoder.register_forward_pre_hook(_require_positions, with_kwargs=True))
        self._replace(decoder.norm, "norm", _norm)
        for index, layer in enumerate(decoder.layers):
            name = f"layers.{index}"
            self._replace(layer.input_layernorm, f"{name}.input_layernorm", _norm)
            self._replace(layer.self_attn, f"{name}.self_attn", self._attention)
            self._replace(layer.post_attention_layernorm, f"{name}.post_attention_layernorm", _norm)
            if hasattr(layer.mlp, "experts"):
                routed = _Routed(getattr(config, "routed_scaling_factor", 1.0))
                self._replace(layer.mlp.gate, f"{name}.mlp.gate", routed.router)
                self._replace(layer.mlp.experts, f"{name}.mlp.experts", routed.experts)
                if hasattr(layer.mlp, "shared_experts"):
                    self._replace(layer.mlp.shared_experts, f"{name}.mlp.shared_experts", _mlp)
            else:
                self._replace(layer.mlp, f"{name}.mlp", _mlp)
        if self._head is not None:
            self._head.engine_logprobs = kernels.token_logprobs

    def detach(self) -> None:
        """Give the model its own values back. A second call does nothing."""
        if self._decoder.__dict__.get(_MATCHED) is not self:
            return
        del self._decoder.__dict__[_MATCHED]
        while self._hooks:
            self._hooks.pop().remove()
        if self._head is not None:
            self._head.engine_logprobs = None

    def _replace(self, module: nn.Module, name: str, engine: Callable[..., Any]) -> None:
        """Have `module`'s output take the value of `engine(module, args, kwargs, output)`."""
        self.unchecked.add(name)

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            if given.dtype != torch.bfloat16 or torch.compiler.is_compiling():
                raise ReplayError(
                    f"{name}: the engine's numerics are those of bfloat16 in eager mode, got {given.dtype}"
                    + (" under torch.compile" if torch.compiler.is_compiling() else "")
                )
            with torch.no_grad(), torch.autocast(given.device.type, enabled=False):
                values = engine(module, args, kwargs, output)
                if name in self.unchecked:
                    _require_near(name, module, output, values)
                    self.unchecked.discard(name)
            if not isinstance(output, tuple):
                return with_value(output, values)
            own = (part if value is None else part.to(value.dtype) for part, value in zip(output, values, strict=True))
            return tuple(o if v is None else with_value(o, v) for o, v in zip(own, values, strict=True))

        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _attention(self, module: Any, args: tuple, kwargs: dict, output: Any) -> tuple[Tensor, None]:
        hidden = args[0] if args else kwargs["hidden_states"]
        positions = kwargs["position_ids"]
        self._sequences.find(positions, len(hidden))
        width = module.head_dim
        query, key, value = (
            kernels.linear(hidden, part.weight, part.bias).view(-1, part.weight.shape[0] // width, width)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query = kernels.rms_norm(query, module.q_norm.weight, module.q_norm.variance_epsilon)
            key = kernels.rms_norm(key, module.k_norm.weight, module.k_norm.variance_epsilon)
        kernels.rotate(query, key, positions.expand(hidden.shape[:2]).flatten(), self._rotation)
        mixed = kernels.attention(query, key, value, self._sequences.bounds, self._sequences.longest, self._scale)
        mixed = mixed.view(*hidden.shape[:2], -1)
        return kernels.linear(mixed, module.o_proj.weight, module.o_proj.bias), None


def match_engine(model: nn.Module, head: FusedHead | None = None) -> MatchedModel:
    """Give `model`'s forward the values of a batch-invariant vLLM engine, and leave it its own gradients.

    With replayed routing and the engine's weights, log-probabilities are then those that the engine reported, bit for
    bit. Each block's first forward is compared with the model's own. Sequences are told apart by position ids, which
    restart at 0: padding is at the end of its row. Call it after `r3.attach`, before FSDP2 wraps the model.

    Args:
        model: in bfloat16, of a type in `r3.numerics.MODEL_TYPES`, or a wrapper around one.
        head: the handle of `fused_head(model)`, whose log-probabilities are matched too.

    Returns:
        A handle; `.detach()` undoes.

    Raises:
        UnsupportedModelError: a model whose blocks have no engine's kernels here, by name.
        ReplayError: this was called for the model before.
        ConfigError: no Hopper GPU, no vLLM, or `r3.numerics.prepare()` was not called first.
    """
    return MatchedModel(model, head)


def _norm(module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    return kernels.rms_norm(args[0], module.weight, module.variance_epsilon)


def _mlp(module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    return kernels.mlp(args[0], *(part.weight for part in (module.gate_proj, module.up_proj, module.down_proj)))


class _Routed:
    """The router of a layer and its experts. transformers scales the weights, the engine what the experts sum to."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._weights = torch.empty(0)  # from the router to the experts, before the scale

    def router(self, module: Any, args: tuple, kwargs: dict, output: tuple) -> tuple[Tensor, Tensor, None]:
        hidden, ids = args[0].reshape(-1, args[0].shape[-1]), output[2]
        if hasattr(module, "e_score_correction_bias"):
            logits = kernels.float32_linear(hidden, module.weight)
            self._weights = kernels.sigmoid_weights(logits, ids)
        else:
            logits = kernels.linear(hidden, module.weight)
            self._weights = kernels.softmax_weights(logits, ids, renormalize=module.norm_topk_prob)
        return logits, self._weights * self._scale, None

    def experts(self, module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        hidden, ids, _ = args
        value = kernels.experts(hidden, module.gate_up_proj, module.down_proj, self._weights, ids)
        return value.view(output.shape) * self._scale


def _require_positions(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
    """Padding before a sequence would be taken for a part of it."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all()):
        raise ReplayError(
            "attention_mask: expected rows that begin with a token, got padding before it: the engine's numerics tell "
            "sequences apart by position ids alone. Pad at the end, or pack"
        )


def _require_near(name: str, module: nn.Module, output: Any, values: Any) -> None:
    pairs = zip(output, values, strict=True) if isinstance(output, tuple) else [(output, values)]
    for own, value in pairs:
        if value is None:
            continue
        own, value = own.float(), value.float()
        # By rows, of which those of padding may differ: attention masks them, and the engine has none.
        apart = ((own - value).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-20)).median().item()
        if not apart <= MOST_APART:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}): expected its own result within {MOST_APART:g} of the engine's "
                f"kernel, got a relative error (median of rows) of {apart:.2g}: they compute different things"
            )


def _require_known(model: Any) -> None:
    config, problem = model.config, None
    if config.model_type not in MODEL_TYPES:
        problem = f"expected one of {', '.join(MODEL_TYPES)}"
    elif config.head_dim < kernels.SMALLEST_HEAD:
        problem = (
            f"head_dim {config.head_dim}: with up to 64, vLLM's attention sums in another order in decoding than in "
            "prefill, also where it is batch-invariant"
        )
    elif getattr(config, "n_group", 1) != 1:
        problem = f"n_group {config.n_group}: a choice among groups of experts is not matched"
    elif config.model_type == "glm4_moe" and not config.norm_topk_prob:
        problem = "norm_topk_prob False: the engine has another kernel for weights that are not normalised"
    elif any(hasattr(module, "route_tokens_to_experts") for module in model.modules()):
        problem = f"transformers {version('transformers')} chooses experts outside of the router, from 5.14 on in it"
    elif getattr(config, "use_sliding_window", False):
        problem = "use_sliding_window: windows are not matched"
    if problem is not None:
        raise UnsupportedModelError(f"the engine's numerics, {config.model_type}: {problem}")


def _transformers_model(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise UnsupportedModelError(
            f"expected a transformers model or a wrapper around one, got {type(model).__name__}"
        )
    return found
