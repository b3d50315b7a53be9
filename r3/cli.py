"""The command line: `r3 demo`, `r3 report`."""

import argparse
import os
import sys
from pathlib import Path

from r3.errors import R3Error


def _example(name: str) -> Path:
    """An example script: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "examples", here / "_examples"):
        if (folder / name).is_file():
            return folder / name
    raise R3Error(f"{name} is neither in {here.parent / 'examples'} nor in {here / '_examples'}: reinstall r3")


def demo(args: argparse.Namespace) -> None:
    if args.settings:
        from r3.config import R3Config

        for key, value in R3Config().to_flat().items():
            print(f"{key}={value}")
        return
    script = _example("grpo_fsdp.py")
    # In place of this process: signals, exit code and the engine's parent are then the script's own.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-W", "ignore", str(script), *args.overrides])


def report(args: argparse.Namespace) -> None:
    from r3.diagnostics import write_report

    print(write_report(args.run))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="r3", description="Rollout routing replay for mixture-of-experts models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    sub = commands.add_parser("demo", help="train a small MoE with vLLM rollouts and routing replay")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as trainer.max_steps=3")
    sub.add_argument("--settings", action="store_true", help="list all settings with their defaults, and stop")
    sub.set_defaults(run_command=demo)

    sub = commands.add_parser("report", help="write the report of a run folder, and print where it is")
    sub.add_argument("run", type=Path, help="a run folder")
    sub.set_defaults(run_command=report)

    args = parser.parse_args(argv)
    try:
        args.run_command(args)
    except R3Error as error:
        sys.exit(f"r3: {error}")


if __name__ == "__main__":
    main()
