"""Rollouts during which the weights changed: the version that produced each row, and how to treat such rollouts.

P prompt tokens, G sampled tokens. A forward consumes a token, which gives that token's row, and samples the next one:
the row at position P - 1 + i and sampled token i come from the same weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from r3.capture.rollout import Rollout, Rollouts
from r3.config import MIXED_VERSIONS
from r3.errors import CaptureError, summary
from r3.routing.types import replace_trusted


def stamp_versions(rollout: Rollout, boundaries: Sequence[tuple[int, int]]) -> Rollout:
    """`rollout` with the version of each row, from the boundaries that the consumer of a stream recorded.

    Rows of the prompt have the version of the first sampled token: its prefill gave both. This holds while each sync
    empties the prefix cache, as those of r3 do; a cache that survived would give rows of an older version. The last
    token has no row, and version -1. Versions that sampled nothing took no part.

    Args:
        rollout: one turn, not yet joined.
        boundaries: (number of sampled tokens that had arrived, version of all after them), the first with 0. Note it
            between the engine's pause, when all tokens of the old weights have arrived, and its resumption.

    Raises:
        CaptureError: joined turns; no boundaries, a first one above 0, or counts or versions that fall.

    Example:
        Two sampled tokens of version 5, then version 6: ``stamp_versions(rollout, [(0, 5), (2, 6)])``.
    """
    _require_boundaries(boundaries)
    prompt, generated = len(rollout.prompt_ids), len(rollout.token_ids)
    if not bool(rollout.response_mask.all()):
        raise CaptureError(
            "expected one turn, all of whose generated tokens were sampled; stamp turns before stitching"
        )
    # A prefill that was aborted before its first token still ran under the first version.
    counts = [min(count, generated) for count, _ in boundaries] + [max(generated, 1)]
    row_versions = torch.full((prompt + generated,), -1, dtype=torch.int32)
    took_part = []
    for (_, version), (begin, end) in zip(boundaries, pairwise(counts), strict=True):
        if begin < end:
            took_part.append(version)
            row_versions[prompt - 1 + begin if begin else 0 : prompt - 1 + end] = version
    row_versions[-1] = -1
    routing = rollout.routing
    if routing is not None:
        version = took_part[0] if len(took_part) == 1 else None
        routing = replace_trusted(routing, routing.expert_ids, routing.validity, weight_version=version)
    return replace(rollout, routing=routing, weight_versions=tuple(took_part), row_versions=row_versions)


def resolve_mixed_versions(rollouts: Rollouts, policy: str) -> Rollouts:
    """Apply the setting `generator.inference_engine.mixed_weight_versions` to rollouts that span versions.

    Args:
        rollouts: those of unknown version count as of one version.
        policy: "keep" leaves them unchanged. "invalidate" keeps only rows of the newest version, which sampled the last
            tokens; the others, those of unknown version among them, are routed live. "drop" moves the rollouts to
            `failed`, by their place among the outputs.

    Returns:
        The rollouts, with the number of those that span versions as `mixed_versions`.

    Raises:
        CaptureError: an unknown policy; or every rollout was dropped.

    Example:
        >>> sampled = {"response_mask": torch.tensor([True, True]), "logprobs": torch.tensor([-0.5, -0.1])}
        >>> rollout = Rollout(prompt_ids=[1], token_ids=[2, 3], routing=None, finish_reason="stop", **sampled)
        >>> mixed = stamp_versions(rollout, [(0, 5), (1, 6)])  # the weights changed after the first sampled token
        >>> resolve_mixed_versions(Rollouts([mixed], None), "keep").mixed_versions
        1
    """
    if policy not in MIXED_VERSIONS:
        raise CaptureError(f"policy: expected one of {', '.join(MIXED_VERSIONS)}, got {policy!r}")
    mixed = [rollout.spans_versions for rollout in rollouts]
    items, failed = list(rollouts), dict(rollouts.failed)
    if policy == "invalidate":
        items = [_of_newest(rollout) if spans else rollout for rollout, spans in zip(items, mixed, strict=True)]
    elif policy == "drop":
        places = (place for place in range(len(items) + len(failed)) if place not in rollouts.failed)
        failed |= {
            place: f"sample {place} (prompt {rollout.prompt_index}): the weights changed meanwhile, "
            f"{_versions_text(rollout)}"
            for place, rollout, spans in zip(places, items, mixed, strict=True)
            if spans
        }
        items = [rollout for rollout, spans in zip(items, mixed, strict=True) if not spans]
        if mixed and not items:
            raise CaptureError(
                f"all {len(mixed)} rollouts span weight versions, and the policy is to drop those:"
                f"{summary(failed.values())}"
            )
    return replace(rollouts, items=items, failed=failed, mixed_versions=sum(mixed))


def _of_newest(rollout: Rollout) -> Rollout:
    """`rollout` with only the rows of the newest version that took part valid."""
    routing, row_versions = rollout.routing, rollout.row_versions
    if routing is None:
        return rollout
    newest = rollout.weight_versions[-1]
    kept = torch.zeros(1, len(rollout), dtype=torch.bool) if row_versions is None else (row_versions == newest)[None]
    kept_routing = routing.only(kept.to(routing.device))
    routing = replace_trusted(routing, kept_routing.expert_ids, kept_routing.validity, weight_version=newest)
    return replace(rollout, routing=routing)


def _versions_text(rollout: Rollout) -> str:
    versions = ", ".join(map(str, rollout.weight_versions))
    return f"versions {versions}" if len(rollout.weight_versions) > 1 else f"version {versions} and unknown ones"


def _require_boundaries(boundaries: Sequence[tuple[int, int]]) -> None:
    problems = [] if boundaries and boundaries[0][0] == 0 else ["the first must be (0, version of the first token)"]
    for number, ((count, version), (next_count, next_version)) in enumerate(pairwise(boundaries)):
        if next_count < count or next_version <= version:
            problems.append(f"{number + 1}: ({next_count}, {next_version}) after ({count}, {version})")
    problems += [f"{number}: version {version}" for number, (_, version) in enumerate(boundaries) if version < 0]
    if problems:
        raise CaptureError(
            "boundaries: expected (sampled tokens that had arrived, version) pairs from (0, ...), with counts that do "
            f"not fall and versions from 0 that rise, got {list(boundaries)}:{summary(problems)}"
        )
