"""r3 in ms-swift's GRPO trainer: `import trainer_hooks.ms_swift.plugin` in a file given to `--external_plugins`.

Rollouts come with their routing, training replays it, and the weight sync is complete or raises. All else is
swift's own. `--vllm_engine_kwargs '{"enable_return_routed_experts": false}'` leaves swift as it is.

The modules of this folder import swift when they are used: nothing here is to be imported without it.
"""
