#!/usr/bin/env bash
# GRPO by ms-swift on the demo's model and task, with routing replay. On a CPU, from the root of the checkout:
#
#   R3_EXTRA=swift scripts/make-env
#   PATH=$PWD/.venv-swift/bin:$PATH examples/trainers/ms_swift/run.sh --max_steps 2
#
# Further arguments are swift's. What is for a CPU alone is marked; docs/how-to/ms-swift.md has the lines for GPUs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${OUTPUT:-build/ms_swift}
mkdir -p "$work"
python "$here/problems.py" "$work/problems.jsonl" 512

# One rank of a launcher. On GPUs, swift's own launcher (NPROC_PER_NODE) sets these.
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29577}
# CPU: swift's plugins of vLLM want torchvision.
export VLLM_PLUGINS=""

python -m swift.cli.rlhf \
  --rlhf_type grpo \
  --external_plugins "$here/plugin.py" \
  --model "$here/../../chain_sum_moe" --model_type qwen3_moe --template default --use_chat_template false \
  --tuner_type full \
  --dataset "$work/problems.jsonl" --split_dataset_ratio 0 \
  --reward_funcs chain_sum \
  --use_vllm true --vllm_mode colocate --vllm_max_model_len 256 \
  --num_generations 8 --per_device_train_batch_size 16 --gradient_accumulation_steps 2 \
  --max_completion_length 80 --temperature 1.0 --beta 0 --learning_rate 1e-4 --max_steps 20 \
  --log_rollout_offpolicy_metrics true --logging_steps 1 \
  --output_dir "$work" --save_strategy no --eval_strategy no --report_to none --check_model false \
  --torch_dtype float32 --bf16 false --attn_impl eager --gradient_checkpointing false --ddp_backend gloo \
  --vllm_engine_kwargs '{"kv_cache_memory_bytes": 200000000}' \
  "$@"
# The last two lines are for a CPU.
