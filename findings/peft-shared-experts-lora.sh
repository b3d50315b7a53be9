#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: LoRA of DeepSeek-V3's shared experts. Their modules are plain `nn.Linear` layers, and
# `target_modules` names them by their whole path. PEFT adapts none of them: it takes `gate_proj`, `up_proj` and `down_proj`
# at the end of any name for the parts of the routed experts, which transformers 5 has fused, and adapts these instead, all
# of them. `target_parameters=["shared_experts.gate_proj.weight", ...]` does what was asked.
#
# Installs both in a temporary folder, and exits with 0 as long as the shared experts are left out. Seen:
#     target_modules: model.layers.0.mlp.experts, model.layers.0.mlp.experts.base_layer
#     target_parameters: model.layers.0.mlp.shared_experts.gate_proj, ...up_proj, ...down_proj
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

config = DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
    first_k_dense_replace=0, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16,
)


def adapted(**targets):
    model = get_peft_model(DeepseekV3ForCausalLM(config), LoraConfig(r=2, **targets))
    found = [n for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return [name.removeprefix("base_model.model.") for name in found]


names = [f"model.layers.0.mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")]
model = DeepseekV3ForCausalLM(config)
assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)
by_module = adapted(target_modules=names)
by_parameter = adapted(target_parameters=[f"{name.partition('mlp.')[2]}.weight" for name in names])
print("target_modules:", ", ".join(by_module))
print("target_parameters:", ", ".join(by_parameter))
assert sorted(by_parameter) == sorted(names)
raise SystemExit(1 if set(by_module) & set(names) else 0)
PY
