"""ERNIE 4.5 VL: two sets of experts a layer, for text and for vision tokens, each with its router.

The text router is replayed. In an input with images it sees the text tokens only, which no routing describes: such a
forward raises.
"""

from r3.replay.families.family import Family

FAMILIES = {"Ernie4_5_VLMoeMoeTopKRouter": Family(is_replayed=lambda path: ".text_moe." in path)}
