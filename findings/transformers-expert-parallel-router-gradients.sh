#!/usr/bin/env bash
# transformers 5.16.1 (and 5.9.0 to 5.15.0; 5.17.0 is right): a Qwen3-MoE loaded with its experts spread over two ranks
# (`DistributedConfig(tp_size=2, enable_expert_parallel=True)`), the same row on both. The loss is that of one process to the last
# digit. The gradients of the routers are not: each rank keeps the part that comes from its own experts, and nothing adds the
# parts. Their sum is right in the last layer; before it, the gradient that flows back through the layers is wrong as well.
# Nothing is said.
#
# Installs transformers in a temporary folder, compares both, and exits with 0 as long as they differ. Seen:
#     loss 4.174735, of one process 4.174735; of a gradient, the largest difference over its largest value:
#     rank 0: routers 1.037, the rest without experts 0.073
#     rank 1: routers 0.818, the rest without experts 0.032
#     last layer's router, summed over the ranks: 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.16.1" "accelerate==1.15.0"
cd "$folder"
cat > compare.py <<'PY'
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

if sys.argv[1] == "make":
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained("model")
    raise SystemExit
dist.init_process_group("gloo")
torch.set_num_threads(1)
ids = torch.arange(1, 25)[None]


def step(model):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return loss.item(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


loss, expected = step(AutoModelForCausalLM.from_pretrained("model").train())
layout = DistributedConfig(tp_size=2, fsdp_size=1, enable_expert_parallel=True)
found_loss, found = step(AutoModelForCausalLM.from_pretrained("model", distributed_config=layout).train())
rank = dist.get_rank()


def difference(name, gradient):
    return float((gradient - expected[name]).abs().max() / expected[name].abs().max())


worst = {"routers": 0.0, "the rest without experts": 0.0}
for name in expected:
    if ".experts." not in name:  # of which each rank has its own
        kind = "routers" if name.endswith("mlp.gate.weight") else "the rest without experts"
        worst[kind] = max(worst[kind], difference(name, found[name]))
last = "model.layers.1.mlp.gate.weight"
total = found[last].clone()
dist.all_reduce(total)
if rank == 0:
    print(f"loss {found_loss:.6f}, of one process {loss:.6f}; of a gradient, the largest difference over its largest value:")
for each in range(2):
    if rank == each:
        print(f"rank {rank}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in worst.items()), flush=True)
    dist.barrier()
if rank == 0:
    print(f"last layer's router, summed over the ranks: {difference(last, total):.3f}")
same_loss = abs(found_loss - loss) < 1e-5
raise SystemExit(0 if same_loss and worst["routers"] > 0.05 and difference(last, total) < 1e-4 else 1)
PY
"$folder/env/bin/python" compare.py make
"$folder/env/bin/torchrun" --nproc-per-node 2 --master-port 29557 compare.py compare
