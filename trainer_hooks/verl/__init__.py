"""Replay in verl's FSDP engines: `actor_rollout_ref.actor.fsdp_config.router_replay.mode`.

verl imports this in each of its processes (entry point `verl.plugins`), and again, with an error where that fails, for
`actor_rollout_ref.model.external_lib=trainer_hooks.verl`.
"""

from trainer_hooks.verl.plugin import install

install()
