"""The demo's GRPO run on a Ray cluster: the same command for one machine and for many.

    python examples/grpo_ray.py
    python examples/grpo_ray.py ray.num_workers=4 generator.inference_engine.num_engines=2
    python examples/grpo_ray.py --address=auto trainer.output_dir=/shared/runs/first ray.num_workers=16
    ray job submit -- python examples/grpo_ray.py ray.num_workers=16

It joins the cluster at `--address`, at RAY_ADDRESS, or that runs on this machine; else it starts one here, for the run.
Settings are `key=value`; `--settings` lists those of the run that the other arguments ask for, and starts none.
"""

import sys

from grpo_demo import DEFAULTS, LIST, demo_config, demo_task, say, show_log

ADDRESS = "--address="
ON_RAY = {
    "ray.num_workers": 1,
    # From any node to any other, with GPUs and without.
    "generator.inference_engine.weight_sync.transport": "gloo",
    "trainer.diagnostics.sinks": ["ray"],
}


def main(arguments: list[str]) -> None:
    from r3.config import settings_lines

    addresses = [each.removeprefix(ADDRESS) for each in arguments if each.startswith(ADDRESS)]
    config = demo_config([each for each in arguments if not each.startswith(ADDRESS)], DEFAULTS | ON_RAY)
    if LIST in arguments:
        print(*settings_lines(config), sep="\n")
        return
    show_log()

    from trainer_hooks.ray import train_on_ray

    say(train_on_ray(config, demo_task(config), address=addresses[-1] if addresses else None))


if __name__ == "__main__":
    from r3 import R3Error

    try:
        main(sys.argv[1:])
    except R3Error as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
