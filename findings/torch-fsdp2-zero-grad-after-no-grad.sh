#!/usr/bin/env bash
# torch 2.13.0, FSDP2: after a forward under no_grad, as one that measures or scores, model.zero_grad() leaves the gradients
# of the parameters that the root unit holds by itself (embeddings, final norm, head), and the next backward adds to them.
# The root stays gathered after a forward; where no backward follows, the module's parameters are the gathered ones, which
# have no gradient, and not the sharded ones, which have. optimizer.zero_grad() clears all: it has the sharded ones.
#
# Installs torch in a temporary folder, shards three layers in one process on the CPU, and exits with 0 as long as the next
# gradient is twice the right one. Seen:
#     zero_grad after the backward: [1.0, 1.0, 1.0, 1.0, 1.0]
#     left after a forward without gradient and zero_grad: [True, False, False, True, True]
#     of the next backward, over right: [2.0, 1.0, 1.0, 2.0, 2.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" numpy
cat >"$folder/shard.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 1))
mesh = dist.init_device_mesh("cpu", (1,))
fully_shard(model[1], mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
tokens = torch.arange(8)


def gradients():
    model(tokens).sum().backward()
    return [p.grad.full_tensor().clone() for group in optimizer.param_groups for p in group["params"]]


once = gradients()
model.zero_grad()
again = gradients()
print("zero_grad after the backward:", [round(float((a / b).nanmean()), 3) for a, b in zip(again, once)])
with torch.no_grad():
    model(tokens)
model.zero_grad()
left = [p.grad is not None for group in optimizer.param_groups for p in group["params"]]
print("left after a forward without gradient and zero_grad:", left)
after = gradients()
print("of the next backward, over right:", [round(float((a / b).nanmean()), 3) for a, b in zip(after, once)])
PY
seen=$("$folder/env/bin/python" "$folder/shard.py" 2>/dev/null)
echo "$seen"
[[ $(tail -n 1 <<<"$seen") == *"[2.0, 1.0, 1.0, 2.0, 2.0]" ]]
