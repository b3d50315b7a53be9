"""The command line: `r3 demo`, `r3 settings`, `r3 doctor`, `r3 explain`, `r3 compare`, `r3 report`."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from r3.errors import R3Error


def _example(name: str) -> Path:
    """An example script: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "examples", here / "_examples"):
        if (folder / name).is_file():
            return folder / name
    raise R3Error(
        f"{name} is neither in {here.parent / 'examples'} nor in {here / '_examples'}: install the wheel again, or run "
        "from a checkout"
    )


def demo(args: argparse.Namespace) -> None:
    script = _example("grpo_demo.py")
    listing = ["--settings"] if args.settings else []
    # In place of this process: signals, exit code and the engine's parent are then the script's own.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-W", "ignore", str(script), *listing, *args.overrides])


def settings(args: argparse.Namespace) -> None:
    from r3.config import settings_table

    print(settings_table())


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What libraries and their processes print does not come between the lines of our own output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def doctor(args: argparse.Namespace) -> None:
    from r3.config import R3Config
    from r3.doctor import examine

    config = R3Config.from_overrides(args.overrides, {"trainer.policy.model.path": args.model or ""})
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # also in the engine's processes
    checks = []
    with _stdout_to_stderr() if args.json else contextlib.nullcontext():
        for check in examine(
            config,
            url=args.url,
            engine=args.engine,
            sync=args.sync,
            agreement=args.agreement,
            arrives=args.arrival,
            timeout_s=args.timeout_s,
            api_key=args.api_key,
        ):
            checks.append(check)
            if not args.json:
                print(f"{check.status:8} {check.name}: {check.detail}", flush=True)
                if check.remedy:
                    print(f"{'':8} -> {check.remedy}", flush=True)
    problems = sum(check.status == "problem" for check in checks)
    if args.json:
        print(json.dumps({"problems": problems, "checks": [asdict(check) for check in checks]}, indent=2))
    if problems:
        sys.exit(1)


def explain(args: argparse.Namespace) -> None:
    from r3.diagnostics.run_folder import json_values
    from r3.explain import Limits, explain_file, explanation_lines

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    limits = Limits(max_tokens=args.max_tokens)
    with _stdout_to_stderr():
        explanation = explain_file(args.model, args.rollout, earlier=args.earlier, device=args.device, limits=limits)
    if args.json:
        print(json.dumps(json_values(explanation.to_dict()), indent=2))
    else:
        print("\n".join(explanation_lines(explanation)))
    if explanation.wrong:
        sys.exit(1)


def compare(args: argparse.Namespace) -> None:
    first, second = args.paths
    missing = [str(path) for path in args.paths if not path.exists()]
    if missing:
        raise R3Error(f"compare: no such file or folder: {', '.join(missing)}")
    if first.is_dir() and second.is_dir():
        from r3.report import write_comparison

        page = str(write_comparison(first, second))
        print(json.dumps({"wrong": False, "path": page}) if args.json else page)
        return
    if first.is_dir() or second.is_dir():
        raise R3Error(
            "compare: expected two run folders, or two files of saved rollouts; got a folder and a file: "
            f"{first}, {second}"
        )
    from r3.diagnostics.run_folder import json_values
    from r3.explain import compare_files, pair_lines

    comparison = compare_files(first, second)
    if args.json:
        print(json.dumps(json_values(comparison.to_dict()), indent=2))
    else:
        print("\n".join(pair_lines(comparison)))


def report(args: argparse.Namespace) -> None:
    from r3.report import write_report

    print(write_report(args.run))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="r3", description="Rollout routing replay for mixture-of-experts models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    sub = commands.add_parser("demo", help="train a small MoE with vLLM rollouts and routing replay")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as trainer.max_steps=3")
    sub.add_argument("--settings", action="store_true", help="list this run's settings and what they mean, and stop")
    sub.set_defaults(run_command=demo)

    sub = commands.add_parser("settings", help="list all settings: default, unit, values and meaning, as Markdown")
    sub.set_defaults(run_command=settings)

    sub = commands.add_parser("doctor", help="check this environment, a model, a server or an engine")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run that is meant")
    sub.add_argument("--model", metavar="PATH", help="folder of the policy: trainer.policy.model.path")
    sub.add_argument("--url", help="a vLLM server to check, such as http://127.0.0.1:8000")
    sub.add_argument("--api-key", help="of the server")
    sub.add_argument("--timeout-s", type=float, default=60.0, help="of each of the server's answers (default 60)")
    sub.add_argument(
        "--sync", action="store_true", help="weights are to be synced into the server: check that they can"
    )
    sub.add_argument(
        "--agreement",
        action="store_true",
        help="compare what the server computes with --model, loaded here",
    )
    sub.add_argument(
        "--engine", action="store_true", help="start an engine of the settings, check its capture and what it computes"
    )
    sub.add_argument(
        "--arrival", action="store_true", help="with --engine: sync each kind of weight alone, and see that it arrives"
    )
    sub.add_argument("--json", action="store_true", help="print the results as JSON")
    sub.set_defaults(run_command=doctor)

    sub = commands.add_parser("explain", help="find what explains the gap between saved rollouts and a model")
    sub.add_argument("--model", metavar="PATH", required=True, help="score the rollouts with this checkpoint")
    sub.add_argument(
        "--rollout", metavar="FILE", type=Path, required=True, help="rollouts that r3.capture.save_rollouts wrote"
    )
    sub.add_argument(
        "--earlier",
        metavar="CHECKPOINT",
        action="append",
        default=[],
        help="an older checkpoint that the engine may still have had; may be repeated",
    )
    sub.add_argument("--max-tokens", type=int, default=16384, help="sampled tokens that are scored (default 16384)")
    sub.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    sub.add_argument("--json", action="store_true", help="print the outcome as JSON")
    sub.set_defaults(run_command=explain)

    sub = commands.add_parser("compare", help="set two runs, or two files of saved rollouts, side by side")
    sub.add_argument("paths", nargs=2, type=Path, metavar="PATH", help="two run folders, or two files of rollouts")
    sub.add_argument("--json", action="store_true", help="print the outcome as JSON")
    sub.set_defaults(run_command=compare)

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
