"""The bounds of alarms: settings below `trainer.diagnostics.alarms`."""

from dataclasses import dataclass, fields

from r3.config.fields import at_least, setting, share


@dataclass(frozen=True, kw_only=True)
class AlarmsConfig:
    """Bounds that warn, and bounds that stop the run; null for none.

    `docs/reference/alarms-and-sinks.md` says why these values.
    """

    enabled: bool = setting(False, "Watch the metrics: warn, and stop the run, by the bounds beside this.")
    k3_warn: float | None = setting(
        2e-3,
        "Warn above this KL. Of the replayed side where it is recorded, else of the live one.",
        at_least(0),
        unit="nats per token",
    )
    k3_stop: float | None = setting(
        5e-2, "Stop above this KL; the side as for the warning.", at_least(0), unit="nats per token"
    )
    extreme_frac_warn: float | None = setting(
        1e-3,
        "Warn above this share of tokens whose ratio leaves [1 / extreme_ratio, extreme_ratio]; the side as for k3.",
        share(zero=True),
        unit="share of tokens",
    )
    extreme_frac_stop: float | None = setting(
        1e-2, "Stop above this share of such tokens.", share(zero=True), unit="share of tokens"
    )
    coverage_warn: float | None = setting(
        0.99, "Warn below this share of the rollouts' rows that have routing.", share(zero=True), unit="share of rows"
    )
    coverage_stop: float | None = setting(
        0.9, "Stop below this share of such rows.", share(zero=True), unit="share of rows"
    )
    version_lag_warn: float | None = setting(
        2, "Warn above this lag between the trainer and the oldest row.", at_least(0), unit="weight versions"
    )
    version_lag_stop: float | None = setting(8, "Stop above this lag.", at_least(0), unit="weight versions")

    def bounds(self, name: str) -> tuple[float | None, float | None]:
        """The bounds that warn and that stop, of one of `names`."""
        return getattr(self, f"{name}_warn"), getattr(self, f"{name}_stop")

    @classmethod
    def names(cls) -> list[str]:
        """What has bounds: `k3` has `k3_warn` and `k3_stop`."""
        return [item.name.removesuffix("_warn") for item in fields(cls) if item.name.endswith("_warn")]

    @classmethod
    def lower_is_worse(cls, name: str) -> bool:
        """Whether a metric stops the run below its bound: its default bounds are in that order."""
        warn, stop = cls().bounds(name)
        return warn is not None and stop is not None and stop < warn

    def problems(self, prefix: str) -> list[str]:
        """What contradicts or makes no sense; `prefix` goes before the names."""
        problems = []
        for name in self.names():
            warn, stop = self.bounds(name)
            if warn is None or stop is None:
                continue
            if stop > warn if self.lower_is_worse(name) else stop < warn:
                side = "most" if self.lower_is_worse(name) else "least"
                problems.append(f"{prefix}.{name}_stop: expected at {side} {name}_warn ({warn}), got {stop}")
        bounds = [bound for name in self.names() for bound in self.bounds(name)]
        if self.enabled and not any(bound is not None for bound in bounds):
            problems.append(f"{prefix}.enabled=true needs a bound that is not null")
        if not self.enabled and self != AlarmsConfig():
            problems.append(
                f"{prefix}: bounds are set but nothing watches them; set {prefix}.enabled=true, or leave them"
            )
        return problems
