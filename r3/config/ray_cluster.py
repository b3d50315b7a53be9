"""What a run on a Ray cluster asks of it."""

from dataclasses import dataclass

from r3.config.fields import above, at_least, setting


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    num_workers: int = setting(
        0,
        "Trainer ranks on a Ray cluster, each with a GPU where it has any; 0 for a run without Ray.",
        at_least(0),
        unit="ranks",
    )
    cpus_per_worker: float = setting(
        1.0, "CPUs that Ray sets aside for a trainer rank, and threads that it lets it use.", above(0), unit="CPUs"
    )
    cpus_per_engine: float = setting(
        1.0, "CPUs that Ray sets aside for an engine, and threads that it lets it use.", above(0), unit="CPUs"
    )
    max_failures: int = setting(
        0,
        "Times that the run begins anew after a node or process is lost, from its newest checkpoint. Needs "
        "`trainer.resume_from=auto`.",
        at_least(0),
        unit="failures",
    )
    start_timeout_s: float = setting(
        60.0, "Longest wait for a place on nodes that are busy, or for a node in place of one lost.", above(0), unit="s"
    )

    def problems(self, resume_from: str) -> list[str]:
        """What contradicts, by dotted name. `resume_from` is the trainer's."""
        problems = []
        if self.max_failures and resume_from != "auto":
            problems.append(
                f"ray.max_failures={self.max_failures}: expected trainer.resume_from=auto with it, to go on from a "
                f"checkpoint, got {resume_from!r}"
            )
        if not self.num_workers and self != RayConfig():
            problems.append("ray.num_workers: expected 1 or more beside other settings of ray, got 0")
        return problems
