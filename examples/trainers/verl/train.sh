#!/bin/sh
# GRPO on chain sums with verl on one GPU, routing replayed: python examples/trainers/verl/prepare.py FOLDER, then
#     examples/trainers/verl/train.sh FOLDER
# Further arguments are verl's own settings, `key=value`, and win.
set -e
folder=$1
shift
here=$(cd "$(dirname "$0")" && pwd)

exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
  +actor_rollout_ref.actor.fsdp_config.router_replay.mode=R3 \
  actor_rollout_ref.rollout.enable_rollout_routing_replay=True \
  actor_rollout_ref.model.external_lib=trainer_hooks.verl \
  +actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.head_dtype=float32 \
  algorithm.adv_estimator=grpo \
  "data.train_files=$folder/train.parquet" \
  "data.val_files=$folder/test.parquet" \
  data.train_batch_size=64 \
  data.max_prompt_length=64 \
  data.max_response_length=64 \
  "reward.custom_reward_function.path=$here/reward.py" \
  "actor_rollout_ref.model.path=$folder/model" \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.optim.lr=1e-4 \
  actor_rollout_ref.actor.ppo_mini_batch_size=16 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096 \
  actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=4096 \
  trainer.n_gpus_per_node=1 \
  trainer.nnodes=1 \
  trainer.total_training_steps=50 \
  trainer.test_freq=10 \
  trainer.save_freq=-1 \
  'trainer.logger=[console]' \
  trainer.project_name=r3 \
  trainer.experiment_name=chain_sum \
  "$@"
