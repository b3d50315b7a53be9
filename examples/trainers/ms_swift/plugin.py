"""For `--external_plugins`: routing replay, and the reward of chain sums in words. See run.sh."""

import re
from typing import Any

from swift.rewards import ORM, orms

import trainer_hooks.ms_swift.plugin  # noqa: F401  # routing replay: this line is all that it takes


class ChainSum(ORM):
    """1 for the right number between the last <answer> tags, else 0."""

    def __call__(self, completions: list[str], answer: list[str], **_: Any) -> list[float]:
        found = (re.findall(r"<answer>(.*?)</answer>", completion) for completion in completions)
        return [float(bool(said) and said[-1].strip() == right) for said, right in zip(found, answer, strict=True)]


orms["chain_sum"] = ChainSum
