"""Expert layers of stock transformers models, computed faster: an experts function for transformers' registry.

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation=r3.experts.register())

Shapes: T tokens, K slots, S = T * K pairs of both, E experts, H hidden, I intermediate.
"""

from r3.experts.choice import AUTO, register, unfit, use_experts
from r3.experts.grouped import NAME, grouped_experts

__all__ = ["AUTO", "NAME", "grouped_experts", "register", "unfit", "use_experts"]
