#!/usr/bin/env bash
# transformers 5.22.0 (and 5.20.0, 5.21.0; 5.23.0 is right): a Qwen3-MoE loaded with FSDP2 over two ranks and its experts spread
# over the same two (`DistributedConfig(fsdp_size=2, ep_size=2)`). Both ranks have the same row, so that the gradients, averaged
# over the ranks, should be those of one process. Those of attention, norms and routers are. Those of the experts are half.
# Nothing is said, and the loss is right.
#
# Installs transformers in a temporary folder, compares both, and exits with 0 as long as experts get half. Seen:
#     loss 4.174735, of one process 4.174735
#     experts: gradients are 0.500 to 0.500 of one process's
#     the rest: 1.000 to 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.22.0" "accelerate==1.15.0"
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
layout = DistributedConfig(fsdp_size=2, ep_size=2)
found_loss, found = step(AutoModelForCausalLM.from_pretrained("model", distributed_config=layout).train())
ratios = {"experts": [], "the rest": []}
for name, gradient in expected.items():
    kind = "experts" if ".experts." in name else "the rest"
    ratios[kind].append(float((found[name] * gradient).sum() / gradient.square().sum()))
if dist.get_rank() == 0:
    print(f"loss {found_loss:.6f}, of one process {loss:.6f}")
    print(f"experts: gradients are {min(ratios['experts']):.3f} to {max(ratios['experts']):.3f} of one process's")
    print(f"the rest: {min(ratios['the rest']):.3f} to {max(ratios['the rest']):.3f}")
dist.barrier()
half = all(abs(ratio - 0.5) < 0.01 for ratio in ratios["experts"])
whole = all(abs(ratio - 1) < 0.01 for ratio in ratios["the rest"])
raise SystemExit(0 if half and whole else 1)
PY
"$folder/env/bin/python" compare.py make
"$folder/env/bin/torchrun" --nproc-per-node 2 --master-port 29556 compare.py compare
