"""What travels between the sender of a sync and vLLM's workers: plain data, of which JSON is enough."""

from collections.abc import Mapping
from typing import Any

Reply = dict[str, Any]
"""One worker's answer to a call: its state, its ranks and the call's results; `error` if it failed."""
Manifest = Mapping[str, tuple[tuple[int, ...], str]]
"""All tensors that will be sent: name -> shape, dtype as `str(tensor.dtype)`."""
