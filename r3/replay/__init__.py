"""Router forward hooks: replay recorded expert choices in stock Hugging Face models.

Limits:
1. A router chooses by one `torch.topk` over its E experts for each token, in its own forward or in the method
   `route_tokens_to_experts` of its block. Others are refused at `attach`, by name.
2. One router a decoder layer, and the keyword travels through the model's forward to its layers as others do.
3. A forward that torch.compile has compiled must not run in two threads at once (the audit then raises).
"""

from r3.replay.attach import Replay, attach
from r3.replay.context import ForwardReport
from r3.replay.discovery import RouterMap, RouterSite, find_routers
from r3.replay.record import Recorder, record

__all__ = ["ForwardReport", "Recorder", "Replay", "RouterMap", "RouterSite", "attach", "find_routers", "record"]
