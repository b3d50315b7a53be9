"""How much a pool asks of an engine, and for how long it waits."""

from dataclasses import dataclass

from r3.errors import CaptureError


@dataclass(frozen=True, kw_only=True)
class PoolLimits:
    """Limits of an `EnginePool`.

    Attributes:
        max_in_flight: most sequences in flight on one engine; what comes beyond waits in the pool. Above the engine's
            `max_num_seqs` they wait in the engine, where no other can take them.
        max_attempts: engines that one request is sent to before it fails. It keeps a request that ends engines from
            ending all of them.
        far_busier: a conversation leaves the engine that holds its prefix if that has more than so many times the
            outstanding tokens of the least loaded one.
        request_timeout_s: longest wait for an answer to a request; then its engine is lost.
        health_every_s: between two health checks of an engine.
        health_timeout_s: longest wait for a health check. After three without an answer the engine is lost.

    Raises:
        CaptureError: a limit that is not above 0, or `far_busier` below 1.
    """

    max_in_flight: int = 256
    max_attempts: int = 3
    far_busier: float = 2.0
    request_timeout_s: float = 1800.0
    health_every_s: float = 5.0
    health_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if not value > 0}
        if wrong or self.far_busier < 1:
            raise CaptureError(f"limits: expected values above 0, and far_busier from 1 up, got {self}")
