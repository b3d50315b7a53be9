"""Routing replay in SkyRL's FSDP policies: `python -m trainer_hooks.skyrl ARGUMENTS`, with SkyRL's own arguments.

Or SkyRL's own entry point with `trainer.override_entrypoint=trainer_hooks.skyrl`, which calls `main`.
"""

import sys

from trainer_hooks.skyrl.seams import require_skyrl

__all__ = ["main"]


def main() -> None:
    """What SkyRL's entry point does, with `trainer.policy.fsdp_config.moe_enable_routing_replay` as a further setting.

    Without that setting, SkyRL trains as it does by itself.

    Raises:
        ConfigError: another SkyRL than the hook was made for, or settings with which it would be wrong.
    """
    require_skyrl()
    # Not before: in another SkyRL, what these modules import may be missing.
    from trainer_hooks.skyrl.entry_point import run

    run(sys.argv[1:])
