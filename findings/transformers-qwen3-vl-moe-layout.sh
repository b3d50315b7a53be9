#!/usr/bin/env bash
# transformers 5.23.0: Qwen3-VL-MoE's published checkpoints have the experts as [E, H, 2I] and [E, I, H]. `from_pretrained`
# transposes them where the dimensions say that it must. `save_pretrained` does not transpose them back: what it writes has
# another layout than what was loaded, under the same names. transformers loads both; a reader of the published layout
# alone, such as vLLM's loader, does not.
#
# Installs transformers in a temporary folder, saves what it loaded, and exits with 0 as long as the layouts differ. Seen:
#     model.language_model.layers.0.mlp.experts.down_proj: loaded (4, 48, 64), saved (4, 64, 48)
#     model.language_model.layers.0.mlp.experts.gate_up_proj: loaded (4, 64, 96), saved (4, 96, 64)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0"
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

E, H, I = 4, 64, 48
text = dict(
    vocab_size=96, hidden_size=H, intermediate_size=64, moe_intermediate_size=I, num_hidden_layers=1, num_experts=E,
    num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
)
vision = dict(hidden_size=32, intermediate_size=32, depth=1, num_heads=2, out_hidden_size=H, patch_size=16,
              num_position_embeddings=16, deepstack_visual_indexes=[0])
torch.manual_seed(0)
model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
model.save_pretrained("made")
weights = load_file("made/model.safetensors")
experts = [name for name in weights if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
published = {"gate_up_proj": (E, H, 2 * I), "down_proj": (E, I, H)}
for name in experts:  # as it is published
    if tuple(weights[name].shape) != published[name.rpartition(".")[2]]:
        weights[name] = weights[name].transpose(1, 2).contiguous()
save_file(weights, "made/model.safetensors", {"format": "pt"})
loaded = Qwen3VLMoeForConditionalGeneration.from_pretrained("made")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
loaded.save_pretrained("saved")
saved = load_file("saved/model.safetensors")
differ = False
for name in experts:
    differ |= saved[name].shape != weights[name].shape
    print(f"{name}: loaded {tuple(weights[name].shape)}, saved {tuple(saved[name].shape)}")
raise SystemExit(0 if differ else 1)
PY
