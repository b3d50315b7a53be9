"""What every rank of the tests is forked from: the imports that most of them need, and no threads."""

import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import transformers.models.qwen3_moe.modeling_qwen3_moe

import r3.parallel
import r3.replay
import r3.weight_sync  # noqa: F401
