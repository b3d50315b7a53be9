#!/usr/bin/env bash
# transformers 5.23.0 (and 5.24.0): `from_pretrained(distributed_config=DistributedConfig(fsdp_size=2))` of Kimi Linear. The
# checkpoint has the convolutions of queries, keys and values apart, and transformers joins them as it loads them. With FSDP2
# each rank reads its slice of each and joins these: the weight that the ranks hold together is another than that of one
# process, with its rows in another order. Nothing is said. The same goes for Bailing hybrid, and for the experts' gate and up
# weights of Inkling 2 with tp_size=2 instead.
#
# Installs transformers in a temporary folder, compares both, and exits with 0 as long as they differ. Seen:
#     model.layers.0.self_attn.conv1d.weight: differs in 64 of 96 rows
#     model.layers.1.self_attn.conv1d.weight: differs in 64 of 96 rows
#     log-probabilities differ by up to 0.085 nats
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"
cd "$folder"
cat > compare.py <<'PY'
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, KimiLinearConfig, KimiLinearForCausalLM
from transformers.distributed import DistributedConfig

if sys.argv[1] == "make":
    torch.manual_seed(0)
    config = KimiLinearConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_token=2,
        layer_types=["linear_attention", "linear_attention"], linear_num_heads=2, linear_head_dim=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    KimiLinearForCausalLM(config).save_pretrained("model")
    raise SystemExit
dist.init_process_group("gloo")
torch.set_num_threads(1)
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    whole = AutoModelForCausalLM.from_pretrained("model").eval()
    expected = whole(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    spread = AutoModelForCausalLM.from_pretrained("model", distributed_config=DistributedConfig(fsdp_size=2)).eval()
    found = spread(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    for module in spread.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    differ = 0
    for name, weight in spread.named_parameters():
        one, other = (w.reshape(len(w), -1) for w in (weight.full_tensor(), whole.get_parameter(name)))
        rows = int((one != other).any(1).sum())
        differ += rows
        if rows and dist.get_rank() == 0:
            print(f"{name}: differs in {rows} of {len(one)} rows")
    if dist.get_rank() == 0:
        print(f"log-probabilities differ by up to {(found - expected).abs().max():.2g} nats")
raise SystemExit(0 if differ else 1)
PY
"$folder/env/bin/python" compare.py make
"$folder/env/bin/torchrun" --nproc-per-node 2 --master-port 29555 compare.py compare
