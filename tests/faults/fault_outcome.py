"""How a schedule of faults ended, and what an error must say of it."""

import re
from dataclasses import dataclass, field
from typing import Any

from schedules import Fault


@dataclass
class Outcome:
    """How a schedule ended.

    Attributes:
        kind: "committed", "refused" (nothing was touched; what was served is right), "poisoned, healed", "restarted".
        violations: of what must hold.
    """

    kind: str = ""
    seconds: float = 0.0
    reached: bool = True
    said: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = "".join(f"\n       {line[:400]}" for line in self.said)
        wrong = "".join(f"\n       VIOLATION: {line[:3000]}" for line in self.violations)
        return f"{self.kind}{'' if self.reached else ' (fault not reached)'}, {self.seconds:.1f} s{said}{wrong}"


def vars_of(fault: Fault) -> dict[str, Any]:
    return {name: getattr(fault, name) for name in ("kind", "point", "when", "how", "rank", "pick")}


def expected(fault: Fault, happened: list[dict]) -> list[str] | None:
    """What the error must say if this fault was what ended the sync; None if the fault did not happen."""
    mine = [e for e in happened if e["kind"] == fault.kind]
    worker = "worker rank" if fault.rank is None else f"worker rank {fault.rank}"
    tensor = next((re.escape(e["tensor"].split("\0")[0]) for e in mine if e.get("tensor")), "")
    match fault.kind:
        case "old version":
            return ["expected a version above"]
        case "two at once":
            return [""]
        case "worker killed":
            return ["http://|worker rank"]
        case _ if not mine:
            return None
        case "sender raises":
            return ["injected"]
        case "worker raises":
            return [worker, "no memory left"]
        case "worker memory" | "transit":
            return [worker, tensor]
        case "file":
            return ["worker rank"]
        case "call":
            return ["worker rank|broadcast", "chunk|not come|does not come|not open"]
        case "content":
            layer = re.match(r"(model\\\.)?(layers\\\.\d+|\w+)", tensor)
            return [layer[0] if layer and fault.how in ("missing", "larger", "smaller") else tensor]
        case "disk full":
            return ["No space left|File too large"]
        case "worker stopped":
            return ["worker rank|http://|broadcast|join"]
        case _:
            return [""]
