"""Engine pool: rollouts and weight syncs over any number of engines, of any kind, that come and go."""

from r3.pool.clients import EngineClient, EngineFailedError, client_of
from r3.pool.limits import PoolLimits
from r3.pool.pool import EnginePool

__all__ = ["EngineClient", "EngineFailedError", "EnginePool", "PoolLimits", "client_of"]
