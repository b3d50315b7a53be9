"""Ulysses sequence parallelism and packed rows for stock Hugging Face models, FSDP2 beside it, and the losses."""

from r3.parallel.collectives import gather_sequence
from r3.parallel.expert_adapters import spread_adapters
from r3.parallel.expert_parallel import load_expert_parallel
from r3.parallel.head import FusedHead, TokenScores, fused_head, head_logprobs, head_scores
from r3.parallel.mesh import Mesh, make_mesh, shard_parameters
from r3.parallel.placements import clip_grad_norm, parameter_groups
from r3.parallel.rank_barrier import RankBarrier
from r3.parallel.token_logprobs import IGNORED, mean_over_ranks, next_tokens, token_logprobs
from r3.parallel.ulysses import Ulysses, ulysses

__all__ = [
    "IGNORED",
    "FusedHead",
    "Mesh",
    "RankBarrier",
    "TokenScores",
    "Ulysses",
    "clip_grad_norm",
    "fused_head",
    "gather_sequence",
    "head_logprobs",
    "head_scores",
    "load_expert_parallel",
    "make_mesh",
    "mean_over_ranks",
    "next_tokens",
    "parameter_groups",
    "shard_parameters",
    "spread_adapters",
    "token_logprobs",
    "ulysses",
]
