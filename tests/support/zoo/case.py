"""A family's tiny model: how to build it, drive it, watch its experts, and say what their weights should be."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo import observers
from zoo.config import VOCAB, build_config

BOTH = (torch.float32, torch.bfloat16)
# Moves the choice of experts and must not move their weights: visible only if it is not zero.
CORRECTIONS = ("e_score_correction_bias", "expert_bias", "balancing_biases")


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """One router in one forward: int64 ids `[T, K]` and weights `[T, K]` at the experts, and the router's inputs."""

    ids: Tensor
    weights: Tensor
    args: tuple
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One model family, or one variant of its router.

    Args:
        name: model type, with `-variant` where its router has several ways to work.
        architecture: class of transformers that people train.
        text, parts: settings of the decoder's configuration and, for models that see and hear, of the rest.
        formula: expert weights `[T, K]` in float64 from (router, *its inputs, ids); None if refused.
        router: path of the router of layer `{}`.
        observer: how to see what its experts got.
        num_experts: width of the choice, with experts that compute nothing.
        experts: implementations of the expert layer that this family has.
        dtypes: those in which transformers itself can run it.
        seed: of the weights; chosen so that no token's choice hangs on a tie, in bfloat16 too.
        gain: standard deviation of the logits, roughly.
        correction: standard deviation of the biases that move the choice.
        refused: why recorded ids do not determine this family's result.
        keywords: further inputs of the forward.
    """

    name: str
    architecture: str
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    formula: Callable[..., Tensor] | None = None
    router: str = "model.layers.{}.mlp.gate"
    observer: observers.Observer = observers.at_experts
    num_experts: int = 8
    top_k: int = 2
    num_layers: int = 3
    router_layers: tuple[int, ...] = (1, 2)
    experts: tuple[str, ...] = ("eager", "grouped_mm")
    dtypes: tuple[torch.dtype, ...] = BOTH
    seed: int = 1
    gain: float = 1.5
    correction: float = 0.1
    refused: str | None = None
    keywords: Callable[[Tensor], dict[str, Any]] = lambda ids: {}

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.architecture)

    def build(
        self,
        dtype: torch.dtype = torch.float32,
        experts: str = "eager",
        *,
        sizes: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
    ) -> nn.Module:
        """The model in eval mode; the same weights at every call, whatever the state of the global generator.

        `sizes` are in place of the common settings of `zoo.config`, `text` of the family's own.
        """
        if experts not in self.experts:
            raise ValueError(f"{self.name}: experts is one of {self.experts}, got {experts!r}")
        if dtype not in self.dtypes:
            raise ValueError(f"{self.name}: dtype is one of {self.dtypes}, got {dtype}")
        cls = self.model_class
        config = build_config(cls.config_class, self.text | (text or {}), self.parts, sizes)
        config._attn_implementation = "eager"
        with torch.random.fork_rng(devices=[]), _empty_is_nan():
            torch.manual_seed(0)
            model = cls(config).eval()
        self._randomise(model)
        if "grouped_mm" in self.experts:
            model.set_experts_implementation(experts)
        return _cast(model, dtype)

    def inputs(self, batch: int = 2, length: int = 10, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of a forward over `batch` rows of `length` tokens; the cache is off."""
        ids = torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "use_cache": False} | self.keywords(ids)

    def routers(self, model: nn.Module) -> list[tuple[int, nn.Module]]:
        """(decoder layer, router) of each router that takes part in replay, by layer."""
        return [(layer, model.get_submodule(self.router.format(layer))) for layer in self.router_layers]

    @contextmanager
    def observe(self, model: nn.Module) -> Iterator[dict[int, Seen]]:
        """By decoder layer, what the experts got in the forward that ran last under this context."""
        seen: dict[int, Seen] = {}
        with ExitStack() as stack:
            for layer, router in self.routers(model):
                block = model.get_submodule(self.router.format(layer).rpartition(".")[0])
                self._observe_one(layer, router, block, seen, stack)
            yield seen

    def weights(self, model: nn.Module, layer: int, router_inputs: Seen, ids: Tensor) -> Tensor:
        """float64 `[T, K]`: what the experts `ids` `[T, K]` of this layer should be weighted with.

        Differentiable in the router's parameters. Only `args` and `kwargs` of `router_inputs` are read.
        """
        # A second positional argument is a correction bias: no business of the weights.
        return self.formula(dict(self.routers(model))[layer], router_inputs.args[0], ids, **router_inputs.kwargs)

    def _observe_one(self, layer: int, router: nn.Module, block: nn.Module, seen: dict, stack: ExitStack) -> None:
        inputs: list[tuple] = []

        def before(_, args, kwargs):
            inputs[:] = [(tuple(map(_frozen, args)), {key: _frozen(value) for key, value in kwargs.items()})]

        def report(ids: Tensor, weights: Tensor) -> None:
            seen[layer] = Seen(ids, weights, *inputs[0])

        # The block's input too: DeepSeek V2 before transformers 5.13 takes its gate's weight and never calls the gate.
        for module in (block, router):
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.enter_context(self.observer(block, router, report))

    def _randomise(self, model: nn.Module) -> None:
        """Values that keep every token, layer and expert apart; zeros and ones from initialisation hide mistakes."""
        generator = torch.Generator().manual_seed(self.seed)
        routers = tuple(self.router.format(layer) + "." for layer in range(self.num_layers))
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                noise = torch.randn(tensor.shape, generator=generator)
                in_router = name.startswith(routers)
                if name.endswith(CORRECTIONS):
                    tensor.copy_(self.correction * noise)
                elif tensor.dim() >= 2 and not name.endswith("A_log"):
                    tensor.copy_((self.gain if in_router else 1.0) * tensor.shape[-1] ** -0.5 * noise)
                else:
                    tensor.nan_to_num_(0.0).add_((0.3 if in_router else 0.1) * noise)
            for name, tensor in model.named_buffers():
                if name.endswith(CORRECTIONS):
                    tensor.copy_(self.correction * torch.randn(tensor.shape, generator=generator))
                elif name.endswith("tid2eid"):  # deepseek_v4's table of each token's experts
                    scores = torch.rand(len(tensor), self.num_experts, generator=generator)
                    tensor.copy_(scores.argsort(-1)[:, : self.top_k])
                elif tensor.is_floating_point() and not tensor.isfinite().all():
                    raise AssertionError(f"{self.name}: nobody initialises the buffer {name}")


def _frozen(value: Any) -> Any:
    """A copy outside the graph, that no in-place operation of the model reaches."""
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """What `torch.empty` leaves in a parameter that nobody initialises varies from run to run: mark it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained(dtype=...)` does: some parameters stay in float32, and so do buffers that are not saved."""
    keep = "|".join(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) or "(?!)"
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not re.search(keep, name):
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        # Not saved, and still of the model's dtype: made by the default one.
        if type(module).__name__.endswith("SinusoidalPositionalEmbedding"):
            module.to(dtype)
    return model
