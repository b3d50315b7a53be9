"""What every rank of the tests is forked from: the imports that most of them need, and no threads."""

import importlib

for name in (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "r3.parallel",
    "r3.replay",
    "r3.weight_sync",
):
    importlib.import_module(name)
