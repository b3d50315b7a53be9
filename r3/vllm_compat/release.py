"""What r3 can say of a release of vLLM that it has not seen, by reading its sources."""

import functools
import logging

from r3.errors import ConfigError, summary
from r3.releases import TESTED, unseen
from r3.vllm_compat.seams import check_seams

logger = logging.getLogger("r3")

SEEN = TESTED["vllm"]
UNKNOWN = (
    "what these do now, kernels and values: `r3 doctor --model PATH --engine --arrival` compares them with the trainer"
)


@functools.cache
def unseen_vllm(package: str, version: str) -> str:
    """What is said of the installed vLLM; empty for a release that was tested.

    Raises:
        ConfigError: an unseen release that lacks something that r3 relies on.
    """
    if SEEN.has_seen(version):
        return ""
    report = check_seams()
    if report.unmet:
        raise ConfigError(
            f"{package} {version}: r3 was tested below {SEEN.beyond}, and this release has moved {len(report.unmet)} "
            f"of {report.checked} functions, attributes and routes that r3 relies on. Install one below {SEEN.beyond}:"
            f"{summary(report.unmet)}"
        )
    checked = f"all {report.checked} functions, attributes and routes that r3 relies on are in its sources"
    return unseen(package, version, f"{SEEN.first} to below {SEEN.beyond}", checked=checked, unknown=UNKNOWN)


def warn_of_unseen_vllm() -> None:
    """Warn, once a process, of an installed vLLM that was not tested.

    Raises:
        ConfigError: as `unseen_vllm`.
    """
    import vllm

    _warn(unseen_vllm("vllm", vllm.__version__))


@functools.cache
def _warn(text: str) -> None:
    if text:
        logger.warning("%s", text)
