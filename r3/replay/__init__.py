"""Router forward hooks: replay recorded expert choices in stock Hugging Face models.

Limits of this version:
1. A router must choose by one `torch.topk` over the E experts of each token (a 2-D tensor) inside a module that
   `_can_record_outputs["router_logits"]` of its model names. Others are refused at `attach`.
2. One model must not run in two threads at once.
"""

from r3.replay.attach import Replay, attach
from r3.replay.discovery import RouterMap, RouterSite, find_routers
from r3.replay.instrument import ForwardReport
from r3.replay.record import Recorder, record

__all__ = ["ForwardReport", "Recorder", "Replay", "RouterMap", "RouterSite", "attach", "find_routers", "record"]
