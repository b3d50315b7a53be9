"""Releases of the libraries around r3: which were tested, and what is said of one that was not.

A release that r3 has not seen is used, with a warning. What r3 needs of it is looked for: where that is missing, it is
refused.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tested:
    """Releases of a library.

    Attributes:
        first: the oldest that will do.
        beyond: the first that nobody tried.
    """

    first: str
    beyond: str

    def has_seen(self, version: str) -> bool:
        """Whether `version` is below `beyond`. One that is no number (a build from source: "dev") was not seen."""
        from packaging.version import InvalidVersion, Version

        try:
            return Version(version) < Version(self.beyond)
        except InvalidVersion:
            return False


# docs/reference/compatibility.md has what was seen with each.
TESTED = {
    "python": Tested(first="3.10", beyond="3.14"),
    "torch": Tested(first="2.9", beyond="2.16"),
    "transformers": Tested(first="5.9", beyond="5.25"),
    "vllm": Tested(first="0.22", beyond="0.34"),
}


def unseen(package: str, version: str, tested: str, *, checked: str, unknown: str) -> str:
    """What is said of a release that was not tested.

    Args:
        package, version: as installed.
        tested: the releases that were.
        checked: what was found to be there.
        unknown: what could differ all the same.
    """
    return f"{package} {version}: r3 was tested with {tested}. Checked: {checked}. Unknown: {unknown}"


def has_right_expert_parallelism() -> bool:
    """Whether the installed transformers trains experts right where it spreads them over ranks beside FSDP2.

    In 5.20 to 5.22 their gradients are half of what they should be, on two ranks. 5.23 is right.
    """
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.23.0.dev0")


def trains_spread_experts() -> bool:
    """Whether the installed transformers trains experts right at all where it spreads them over ranks.

    Up to 5.16 gradients of routers, and of all that comes before them, are wrong or NaN. 5.17 is right.
    """
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.17.0.dev0")


def gathers_split_parts() -> bool:
    """Whether the installed torch gathers a fused weight of which every part is sharded, as tensor parallelism does.

    2.11 raises in `DTensor.full_tensor` ("unable to be interpreted"). 2.12, 2.13 and 2.15 are right.
    """
    import torch
    from packaging.version import Version

    return Version(torch.__version__) >= Version("2.12.0.dev0")
