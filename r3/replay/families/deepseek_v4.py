"""DeepSeek-V4: the first MoE layers look the experts up in a table by token id, so that both sides agree always."""

from r3.replay.families.family import Family

FAMILIES = {"DeepseekV4HashRouter": Family(hash_routed=True)}
