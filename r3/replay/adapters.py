"""Says whether adapters of PEFT lie on routers or routed experts: names in `target_modules` reach more than they say.

Where transformers fuses the routed experts, PEFT (0.21) takes the names of their parts (`gate_proj`), also those of
shared experts (`shared_experts.gate_proj`, or a pattern of whole paths), for the routed experts alone, and `all-linear`
for these and the router. `exclude_modules` does not change that.
"""

import logging
from collections.abc import Iterable

from torch import nn

from r3.replay.discovery import RouterSite
from r3.wrappers import is_tuner

logger = logging.getLogger("r3")


def say_adapted(model: nn.Module, sites: Iterable[RouterSite]) -> None:
    """Log a warning if there are adapters on the routers of `model` at `sites`, or on the experts beside them."""
    routers = [site.name for site in sites]
    experts = [f"{name.rpartition('.')[0]}.experts" for name in routers]
    tuned = [f"{path}." for path, module in model.named_modules() if is_tuner(module)]

    def count(paths: list[str]) -> int:
        return sum(any(each.startswith(f"{path}.") for each in tuned) for path in paths)

    found = {"routers": count(routers), "routed experts": count(experts)}
    if any(found.values()):
        logger.warning(
            "PEFT adapts %s, of %d layers with a router. If that is not meant: 'all-linear' reaches both, and names "
            "such as gate_proj, or shared_experts.gate_proj, reach the routed experts. Name the modules of attention, "
            "and shared experts as target_parameters=['shared_experts.gate_proj.weight', ...]",
            " and ".join(f"the {what} of {layers}" for what, layers in found.items() if layers),
            len(routers),
        )
