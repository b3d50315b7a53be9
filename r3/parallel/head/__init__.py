"""Log-probabilities of sampled tokens fused with the language model's head."""

from r3.parallel.head.fused_head import FusedHead, fused_head
from r3.parallel.head.scores import TokenScores, head_logprobs, head_scores

__all__ = ["FusedHead", "TokenScores", "fused_head", "head_logprobs", "head_scores"]
