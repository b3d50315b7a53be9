"""`ulysses`: a stock Hugging Face model on packed rows, and on one rank's slice of them.

Each rank runs the model on its slice of the positions. Positions interact only in attention: there the ranks exchange
heads for positions, run the model's own attention function on whole rows, and exchange back. Position ids that restart
separate sequences; masks and FlashAttention's bounds are made from them here, in the same way for every family.
"""

import copy
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from r3.errors import ParallelError
from r3.parallel.attention import attend, attend_to_self, require_splittable
from r3.parallel.collectives import gather_sequence
from r3.parallel.decoder import gather_positions, narrow, widen
from r3.parallel.masks import whole_mask
from r3.parallel.rank_barrier import RankBarrier
from r3.parallel.sequence_slices import Sequences
from r3.parallel.slicing_proof import prove_local
from r3.routing import RolloutRouting
from r3.routing.positions import ModelInputs, text_positions
from r3.wrappers import FLATTENED, flattened

_ROUTING = "routed_experts"


class _Activity(threading.local):
    """State of a model in the current thread: the sequences of the running forward, or a proof."""

    def __init__(self) -> None:
        self.sequences: Sequences | None = None
        self.wide = False  # whole rows around the decoder
        self.bounds: dict[str, Any] = {}  # FlashAttention's
        self.proof = False


class Ulysses:
    """The handle that `ulysses` returns.

    Attributes:
        rank, size: this rank's place in the group, and how many there are.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, barrier: RankBarrier | None) -> None:
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)
        if self.size > 1 and barrier is None:
            barrier = RankBarrier(group)
        self._group = group
        self._barrier = barrier
        self._activity = _Activity()
        outermost = _transformers_model(model)
        if flattened(model):
            raise ParallelError(FLATTENED)
        if self.size > 1 and (getattr(outermost, "_tp_size", None) or 1) > 1:
            raise ParallelError(
                f"{type(outermost).__name__} is split by tensor parallelism (tp_size={outermost._tp_size}), whose "
                "ranks need the same tokens: its rows cannot be sliced over ranks as well. Load it with tp_size=1: "
                "fsdp_size and ep_size go together with slices"
            )
        decoder = outermost.get_decoder()
        self._config: Any = decoder.config
        self._inputs = ModelInputs(model)
        self._implementation: str = self._config._attn_implementation or "eager"
        if self._implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ParallelError(
                f"attention {self._implementation!r} has no mask function in transformers: packed sequences cannot be "
                f"told apart. Expected one of {sorted(ALL_MASK_ATTENTION_FUNCTIONS)}"
            )
        # The config that the model's own attention function gets: flash attention, for example, looks up its kernel by
        # this name.
        self._plain_config = copy.copy(self._config)
        self._name = f"ulysses_{id(self):x}_{self._implementation}"
        self._handles: list[Any] = []
        ALL_ATTENTION_FUNCTIONS.register(self._name, self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, self._mask)
        self._config._attn_implementation = self._name
        try:
            with self._proving():
                prove_local(outermost)
            self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
            # After replay has compared its routing with this rank's tokens.
            self._handles.append(model.register_forward_pre_hook(self._widen, with_kwargs=True))
            self._handles.append(decoder.register_forward_pre_hook(self._at_decoder, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._end, always_call=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give the model its own attention back. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        if self._config._attn_implementation == self._name:
            self._config._attn_implementation = self._implementation
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(self._name, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(self._name, None)

    # Functions that transformers calls.

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if self._activity.proof:
            require_splittable(query.shape[1], key.shape[1], self.size, module)
            return attend_to_self(query, key, value), None
        return attend(
            module,
            query,
            key,
            value,
            attention_mask,
            group=self._group,
            implementation=self._implementation,
            config=self._plain_config,
            **kwargs,
        )

    def _mask(self, **kwargs: Any) -> Any:
        if self._activity.proof:
            return None
        if self._activity.sequences is None:
            raise ParallelError("a forward that did not begin at the module to which Ulysses attention was attached")
        return whole_mask(
            ALL_MASK_ATTENTION_FUNCTIONS[self._implementation],
            self._activity.sequences,
            whole=self.size == 1 or self._activity.wide,
            implementation=self._implementation,
            **{**kwargs, "config": self._plain_config},
        )

    # Hooks around a forward.

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        tokens = _tokens(args, kwargs)
        problem = self._problem(tokens, kwargs)
        self._agree(problem, tokens, kwargs)
        position_ids, padding = kwargs["position_ids"], kwargs.get("attention_mask")
        position_ids = position_ids.expand(*position_ids.shape[:-2], *tokens.shape[:2])
        text = text_positions(gather_positions(position_ids, self._gather))
        sequences = Sequences(text, None if padding is None else ~self._gather(padding.to(torch.uint8)).bool())
        self._require_in_order(sequences)
        changes: dict[str, Any] = {"use_cache": False}
        if position_ids.dim() == 3:
            mine = slice(self.rank * tokens.shape[1], (self.rank + 1) * tokens.shape[1])
            changes["position_ids"] = torch.cat([text[None, :, mine], position_ids[-3:]])
        # Not None: with position ids and no mask, transformers would add one of this slice's sequences by itself.
        changes["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        self._activity.bounds = {}
        if "flash" in self._implementation:
            bounds, longest = sequences.cu_seqlens
            self._activity.bounds = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            self._activity.bounds |= {"max_length_q": longest, "max_length_k": longest}
        self._activity.wide = self.size > 1 and bool(self._inputs.given(kwargs))
        self._activity.sequences = sequences
        return args, kwargs | changes

    @torch.compiler.disable
    def _widen(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return widen(args, kwargs, self._gather) if self._activity.wide else (args, kwargs)

    def _at_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self._activity.wide and self._activity.sequences is not None:
            batch, length = self._activity.sequences.position_ids.shape
            kwargs = kwargs | narrow(kwargs, (batch, length), self.rank, self.size)
        # Only at the decoder: a vision tower has sequences of its own.
        return args, kwargs | self._activity.bounds

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._activity.sequences, self._activity.bounds = None, {}

    def _gather(self, tensor: Tensor) -> Tensor:
        return tensor if self._group is None else gather_sequence(tensor, self._group)

    def _problem(self, tokens: Tensor, kwargs: dict) -> str | None:
        """The problem with this rank's arguments, in words; None if there is none."""
        shape = tuple(tokens.shape[:2])
        position_ids, mask, routing = (kwargs.get(name) for name in ("position_ids", "attention_mask", _ROUTING))
        if position_ids is None or not _by_token(position_ids, shape):
            got = None if position_ids is None else tuple(position_ids.shape)
            return (
                f"position_ids: expected [B, S] = {shape}, of this rank's slice, restarting at 0 with each sequence "
                f"(or [3, B, S] or [4, B, S] with multimodal rope); got {got}"
            )
        problem = self._inputs.position_problem(kwargs)
        if problem is not None:
            return problem
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
            return (
                f"attention_mask: expected [B, S] = {shape} or none, got {getattr(mask, 'shape', type(mask).__name__)}"
            )
        if routing is not None and not isinstance(routing, RolloutRouting):
            return (
                f"{_ROUTING}: expected a RolloutRouting, which is checked where it is made, before ranks wait for each "
                f"other; got {type(routing).__name__} (attach replay before Ulysses attention)"
            )
        if routing is not None and routing.shape[:2] != shape:
            return f"{_ROUTING}: expected [B, S] = {shape}, that of input_ids, got {routing.shape[:2]}"
        # transformers 5.24 calls past_key_values cache
        names = ("use_cache", "past_key_values", "cache", "output_attentions")
        refused = [name for name in names if kwargs.get(name) not in (None, False)]
        if self.size > 1 and kwargs.get("labels") is not None:
            refused.append("labels (the loss would shift them within a slice; see r3.parallel.next_tokens)")
        return f"a forward on packed or sliced rows takes no {', '.join(refused)}" if refused else None

    def _facts(self, tokens: Tensor, kwargs: dict) -> tuple[int, ...]:
        routing = kwargs.get(_ROUTING)
        kind = None if routing is None else (routing.layer_ids, routing.shape[3], routing.num_experts)
        first = dist.get_rank() if self._group is None else dist.get_process_group_ranks(self._group)[0]
        beside = {name: getattr(kwargs[name], "shape", None) for name in self._inputs.given(kwargs)}
        return first, *tokens.shape[:2], _number((beside, kwargs["position_ids"].dim())), _number(kind)

    def _agree(self, problem: str | None, tokens: Tensor, kwargs: dict) -> None:
        """Raise on every rank if one has a problem, or if their arguments cannot go together."""
        if self._barrier is None:
            if problem is not None:
                raise ParallelError(problem)
            return
        facts = self._facts(tokens, kwargs) if problem is None else (0,) * 5
        facts_of_ranks = self._barrier.exchange(problem, facts).tolist()
        # Every rank checks the facts of all groups, so that all ranks refuse the same forwards.
        shapes = {
            first: {(b, s) for other, b, s, *_ in facts_of_ranks if other == first} for first, *_ in facts_of_ranks
        }
        torn = {first: sorted(seen) for first, seen in shapes.items() if len(seen) > 1}
        if torn:
            raise ParallelError(
                "expected slices of one shape [B, S] on all ranks of a Ulysses group, got "
                + "; ".join(f"{seen} in the group of rank {first}" for first, seen in torn.items())
            )
        if len({(first, beside) for first, *_, beside, _ in facts_of_ranks}) > len(shapes):
            raise ParallelError(
                "expected on all ranks of a Ulysses group the images of the whole rows, or none, and position ids of "
                "one kind; got others on some ranks. Pass pixel_values and what belongs to them unsliced"
            )
        if len({kind for *_, kind in facts_of_ranks}) > 1:
            raise ParallelError(f"expected {_ROUTING} of one kind (layers, slots, experts) or none on all ranks")

    def _require_in_order(self, sequences: Sequences) -> None:
        problem = _misplaced(sequences)
        if self._barrier is not None:
            self._barrier.exchange(problem)
        elif problem is not None:
            raise ParallelError(problem)

    # The proof.

    @contextmanager
    def _proving(self) -> Iterator[None]:
        self._activity.proof = True
        try:
            yield
        finally:
            self._activity.proof = False


def ulysses(model: nn.Module, group: dist.ProcessGroup | None = None, *, barrier: RankBarrier | None = None) -> Ulysses:
    """Run `model` on packed rows, and on one rank's slice of them: `model(input_ids=..., position_ids=...)`.

    Every argument is of this rank's slice `[B, S]`: the rows, padded to a multiple of the group's size, in contiguous
    parts by rank (`r3.routing.shard`). `position_ids` restart at 0 with each sequence, also on padding;
    `attention_mask` `[B, S]` may say what is padding. Logits are those of the slice.

    Beside images, a model with multimodal rope takes its own positions, `[3, B, S]` or `[4, B, S]`. Images and their
    grids are those of the whole rows, the same on each rank: each embeds them, and cuts what reaches the decoder.

    Args:
        model: a transformers model, or a wrapper around one, with the attention implementation that is to do the work.
        group: ranks that share each row, in the order of its slices. None: rows are packed and not split.
        barrier: ranks that must go on together, at least those of the group: all ranks of an FSDP mesh. By default
            the group.

    Returns:
        A handle; `.detach()` undoes.

    Raises:
        ParallelError: the model mixes positions outside its attention interface, its heads cannot be split, or its
            attention cannot mask packed rows.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("examples/chain_sum_moe")
        >>> handle = ulysses(model)
        >>> packed = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        >>> model(**packed).logits.shape[:2]
        torch.Size([1, 5])
        >>> handle.detach()
    """
    return Ulysses(model, group, barrier)


def _transformers_model(model: nn.Module) -> Any:
    outermost = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if outermost is None:
        raise ParallelError(f"expected a transformers model or a wrapper around one, got {type(model).__name__}")
    return outermost


def _by_token(position_ids: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether these are `[B, S]` = `shape` (B may be 1), or three or four of such."""
    if position_ids.dim() == 2:
        return position_ids.shape[1] == shape[1]
    return position_ids.dim() == 3 and position_ids.shape[0] in (3, 4) and tuple(position_ids.shape[1:]) == shape


def _number(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def _tokens(args: tuple, kwargs: dict) -> Tensor:
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    tokens = next((candidate for candidate in candidates if candidate is not None), None)
    if tokens is None:
        raise ParallelError("expected input_ids or inputs_embeds, got neither")
    return tokens


def _misplaced(sequences: Sequences) -> str | None:
    """The problem, if a sequence does not begin at position 0: slices in the wrong order, or positions of other
    tokens."""
    wrong = sequences.starts & (sequences.position_ids != 0)
    if sequences.padding is not None:
        wrong &= ~sequences.padding
    if not wrong.any():
        return None
    where = [
        f"row {row}, position {at}: {int(sequences.position_ids[row, at])}" for row, at in wrong.nonzero()[:4].tolist()
    ]
    return (
        "position_ids: expected each sequence of the gathered rows to begin at 0 and to rise by one. Slices in another "
        f"order than ranks, or positions of other tokens? Found {'; '.join(where)}"
    )
