"""SkyRL's rows of a micro-batch -> routing as its forward lays the tokens out.

Shapes: B samples, S positions, T real tokens of all samples, L layers, K slots.
"""

from skyrl.backends.skyrl_train.distributed.ulysses.utils import ulysses_pad_and_slice_inputs
from skyrl.backends.skyrl_train.utils.packed_tensor import PackedTensor
from torch import Tensor

from r3.errors import ReplayError, RoutingError
from r3.routing import RolloutRouting, RoutingSpec, routing_of
from trainer_hooks.skyrl.config import CAPTURE


def routing_of_microbatch(
    spec: RoutingSpec,
    rows: PackedTensor | None,
    router_padding_mask: Tensor | None,
    attention_mask: Tensor,
    *,
    packed: bool,
    sequence_parallel_size: int,
) -> RolloutRouting:
    """Routing of the forward of a micro-batch.

    Args:
        spec: of the model.
        rows: integer `[T, L, K]`, those of each sample after the other; filled up with dummy ids.
        router_padding_mask: bool `[B, S]`, True for padding and for tokens whose row is a dummy.
        attention_mask: `[B, S]`, not 0 for real tokens.
        packed: whether the forward is of `[1, T]` (remove_microbatch_padding), or of `[B, S]`.
        sequence_parallel_size: over how many ranks SkyRL slices the forward's tokens; this rank's part is returned.

    Raises:
        ReplayError: no rows.
        RoutingError: rows that are not those of these tokens, or not of this model.
    """
    if rows is None or router_padding_mask is None:
        raise ReplayError(
            "micro-batch of the policy: expected rollout_expert_indices and router_padding_mask, got none: replay is "
            f"on. Is {CAPTURE} on, and does the generator pass the engine's routing on?"
        )
    attended = attention_mask.bool()
    expected, got = attended.sum(1).tolist(), rows.sequence_lengths.tolist()
    if got != expected:
        raise RoutingError(f"rollout_expert_indices: expected a row for each token, {expected} by sample, got {got}")
    if rows.values.dim() != 3:
        raise RoutingError(f"rollout_expert_indices: expected [T, L, K], got {tuple(rows.values.shape)}")
    ids, captured = rows.values, attended & ~router_padding_mask.bool()
    if packed:
        ids, captured = ids[None], captured[attended][None]
    else:
        padded = ids.new_zeros(*attended.shape, *ids.shape[1:])
        padded[attended] = ids
        ids = padded
    if sequence_parallel_size > 1:  # SkyRL's own slicing of what belongs to tokens
        ids, captured = (
            ulysses_pad_and_slice_inputs(tensor, sp_size=sequence_parallel_size)[0] for tensor in (ids, captured)
        )
    return routing_of(spec, ids, valid=captured)
