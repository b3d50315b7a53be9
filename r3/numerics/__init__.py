"""Experimental: the engine's numerics in the trainer, for log-probabilities that are the engine's, bit for bit.

r3.numerics.prepare()                          # before CUDA is used
handle = r3.numerics.match_engine(model, head)  # after r3.attach and fused_head
"""

from r3.numerics.matched_model import MODEL_TYPES, MatchedModel, match_engine
from r3.vllm_compat.kernels import prepare

__all__ = ["MODEL_TYPES", "MatchedModel", "match_engine", "prepare"]
