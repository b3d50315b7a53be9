"""The models of one worker that a sync updates: the engine's, and a draft model of the same checkpoint.

Speculative decoding has a second model. One that was loaded from the same checkpoint drafts well only while it has the
weights of the first, so it gets them in the same sync. Any other keeps what it was loaded with: what is sampled stays
right, and fewer of its tokens are accepted as the policy moves away; the receipt says so.
"""

import logging
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from r3.vllm_compat.engines import drafting_model
from r3.weight_sync.worker.derived_tensors import DerivedTensors
from r3.weight_sync.worker.load_plan.layer_record import storage_of
from r3.weight_sync.worker.load_plan.plan import LoadPlan, Manifest
from r3.weight_sync.worker.reload import LayerwiseReload

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class SyncedModel:
    """One model, and what is kept of it from one sync to the next.

    Attributes:
        name: for messages; empty for the engine's own model.
        plan: that the last committed sync learned or used.
    """

    name: str
    model: nn.Module
    vllm_config: Any
    derived: DerivedTensors
    plan: LoadPlan | None = None


@dataclass(kw_only=True, eq=False)
class EngineModels:
    """The models of a worker.

    Attributes:
        synced: the engine's model first.
        draft: "" without a draft model; "synced"; or why it keeps what it has.
    """

    synced: list[SyncedModel]
    draft: str = ""

    @classmethod
    def of(cls, runner: Any, vllm_config: Any) -> "EngineModels":
        """The models of vLLM's model runner."""
        caches = {storage_of(cache) for cache in caches_in(getattr(runner, "kv_caches", None))}
        target, draft = _bare(runner.model), _draft_of(runner)
        synced = lambda name, model: SyncedModel(
            name=name, model=model, vllm_config=vllm_config, derived=DerivedTensors(model, caches)
        )
        models = cls(synced=[synced("", target)])
        if draft is not None:
            models.draft = _why_kept(target, draft, vllm_config)
            if not models.draft:
                models.draft = "synced"
                models.synced.append(synced("draft model", draft))
        return models

    def bracket(self, *, constants: Collection[str] = (), planned: bool = True, **options: Any) -> "EngineReload":
        """For the next sync. `constants`: see `DerivedTensors`; `planned`: whether load plans are used."""
        for synced in self.synced:
            synced.derived.known_constants = constants
            if not planned:
                synced.plan = None
        return EngineReload(self.synced, **options)


class EngineReload:
    """One bracket around a whole sync in each of a worker's models; see `LayerwiseReload`."""

    def __init__(self, models: list[SyncedModel], **options: Any) -> None:
        self._models = models
        self._brackets = [
            LayerwiseReload(synced.model, synced.vllm_config, synced.plan, derived=synced.derived, **options)
            for synced in models
        ]

    @property
    def layers(self) -> dict[str, nn.Module]:
        return {
            f"{synced.name}: {name}" if synced.name else name: layer
            for synced, bracket in zip(self._models, self._brackets, strict=True)
            for name, layer in bracket.layers.items()
        }

    @property
    def only_copies(self) -> bool:
        return all(bracket.only_copies for bracket in self._brackets)

    @property
    def ties(self) -> set[tuple[str, ...]]:
        """Tensors of the checkpoint that the engine holds as one, of brackets that are finished."""
        return {tie for bracket in self._brackets if bracket.learned is not None for tie in bracket.learned.ties}

    def misfits(self, manifest: Manifest) -> list[str]:
        return self._named(lambda bracket: bracket.misfits(manifest))

    def begin(self, manifest: Manifest) -> None:
        for bracket in self._brackets:
            bracket.begin(manifest)

    def whole_targets(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return self._brackets[0].whole_targets(weights)

    def load(self, weights: Iterable[tuple[str, Tensor]], written: Container[str] = ()) -> None:
        weights = list(weights)
        self._brackets[0].load(weights, written=written)
        for bracket in self._brackets[1:]:
            bracket.load(weights)

    def missing(self) -> list[str]:
        return self._named(lambda bracket: bracket.missing())

    def finish(self) -> None:
        for bracket in self._brackets:
            bracket.finish()

    def commit(self) -> None:
        """Keep the load plans that the brackets have learned, for the next sync."""
        for synced, bracket in zip(self._models, self._brackets, strict=True):
            synced.plan = bracket.learned

    def abandon(self) -> None:
        for bracket in self._brackets:
            bracket.abandon()

    def _named(self, ask: Callable[[LayerwiseReload], list[str]]) -> list[str]:
        return [
            f"{synced.name}: {text}" if synced.name else text
            for synced, bracket in zip(self._models, self._brackets, strict=True)
            for text in ask(bracket)
        ]


def _bare(model: Any) -> Any:
    """A model without vLLM's wrappers for CUDA graphs."""
    while not isinstance(model, nn.Module) and hasattr(model, "unwrap"):
        model = model.unwrap()
    return model


def _draft_of(runner: Any) -> Any:
    model = _bare(drafting_model(runner))
    return model if isinstance(model, nn.Module) else None


def _why_kept(target: nn.Module, draft: nn.Module, vllm_config: Any) -> str:
    """Why a draft model cannot take the weights of the engine's model; empty if it can."""
    path = getattr(getattr(vllm_config.speculative_config, "draft_model_config", None), "model", None)
    if type(draft) is not type(target) or path != vllm_config.model_config.model:
        why = f"keeps the weights that it was loaded with: {type(draft).__name__} of {path} is another model"
    elif {*draft.parameters()} & {*target.parameters()}:
        why = "keeps the weights that it was loaded with: it shares some with the engine's model"
    else:
        return ""
    logger.warning("The draft model %s. Fewer of its tokens are accepted as the policy moves away", why)
    return why


def caches_in(caches: Any) -> Iterator[Tensor]:
    """The tensors of a model runner's caches, however they are nested."""
    if isinstance(caches, Tensor):
        yield caches
    elif isinstance(caches, dict):
        yield from caches_in(list(caches.values()))
    elif isinstance(caches, (list, tuple)):
        for cache in caches:
            yield from caches_in(cache)
