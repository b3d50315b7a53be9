"""The sentences of an explanation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r3.diagnostics import RoutingSums
from r3.explain.adjustments import Adjustment
from r3.explain.distributions import Distribution
from r3.explain.hypotheses import Hypothesis
from r3.explain.outcome import Cause

RELATED = 0.9
"""Correlation of probabilities from which two models are near relatives, such as steps of one run."""
NO_ROUTING = "the rollouts carry no routing: whether routing explains a gap could not be tested"


def _times(without: float, with_it: float) -> str:
    return f"k3 {without:.2e} without it, {with_it:.2e} with it"


def clamped(count: int) -> str:
    return f"{count} tokens whose log-probability is a clamp (below -1000 nats) were left out"


def insignificant(name: str, without: float, with_it: float) -> str:
    return (
        f"{name.replace('_', ' ')} may explain a part (k3 {without:.2e} without it, {with_it:.2e} with it), but a few "
        "tokens make up the difference: save more rollouts to tell"
    )


def too_few(tokens: int, least: int) -> str:
    return (
        f"cannot be told: {tokens} sampled tokens, and fewer than {least} name no cause. Save more rollouts, or longer "
        "ones"
    )


def verdict(causes: Sequence[Cause]) -> str:
    names = {cause.name for cause in causes}
    wrong = [cause.name.replace("_", " ") for cause in causes if cause.wrong]
    if not wrong and "routing" in names:
        return "nothing is wrong: routing explains the gap, replay removes it, and what remains is precision"
    if not wrong:
        return "nothing is wrong: the gap is that of precision"
    if wrong == ["unexplained"]:
        return "cannot be explained: none of the causes that were tested accounts for the gap"
    return f"something is wrong: {', '.join(name for name in wrong if name != 'unexplained')}" + (
        ", and a part that is not explained" if "unexplained" in wrong else ""
    )


def precision(remaining: float, floor: float, replayed: bool) -> Cause:
    flips = "" if replayed else ", the routing that flips with it included"
    return Cause(
        name="precision",
        text=f"what remains, k3 {remaining:.2e}, is of the size by which the model's own bfloat16 and float32 scores "
        f"differ, {floor:.2e}{flips}",
        figures={"k3": remaining, "own_k3": floor},
    )


def routing(without: float, with_it: float, agreement: RoutingSums | None) -> Cause:
    share = agreement.metrics()["differing_rows"] if agreement is not None and agreement.rows else None
    differing = "" if share is None else f"; {100 * share:.1f}% of the live choices differ from the rollouts'"
    return Cause(
        name="routing",
        text=f"replay of the rollouts' routing lowers the gap {without / with_it:.1f} times: k3 {without:.2e} live, "
        f"{with_it:.2e} replayed{differing}",
        figures={"k3_live": without, "k3_replayed": with_it},
    )


def stale(name: str, without: float, with_it: float) -> Cause:
    return Cause(
        name="stale_sync",
        text=f"the rollouts were sampled with the weights of {name}, not with the model's: {_times(without, with_it)}",
        remedy="the engine's weights are behind the trainer's: look at the sync's receipts (sync/version) and at what "
        "`r3 doctor --url` says of the workers' version; push, and sample anew",
        figures={"checkpoint": name, "k3_without": without, "k3_with": with_it},
    )


def stale_version(older: int, older_k3: float, newest: int, newest_k3: float) -> Cause:
    return Cause(
        name="stale_sync",
        text=f"the rollouts' own versions tell: tokens of version {older} have k3 {older_k3:.2e}, those of version "
        f"{newest} {newest_k3:.2e}",
        remedy="rollouts span a sync: resolve_mixed_versions, or importance weights, where the older tokens are used",
        figures={"older_version": older, "k3_older": older_k3, "newest_version": newest, "k3_newest": newest_k3},
    )


def lagging(lag: int, remaining: float) -> Cause:
    return Cause(
        name="stale_sync",
        text=f"the rollouts' newest weights are {lag} versions behind the trainer's, as their own versions tell, and "
        f"nothing else explains k3 {remaining:.2e}",
        remedy="give the checkpoint of that version with --earlier to confirm it; then sync, and sample anew",
        figures={"versions_behind": lag, "k3": remaining},
    )


def weights(least: float, correlation: float, earlier: int, lag: int, *, alone: bool, differing: float | None) -> Cause:
    """Args: `alone` whether a change of the distribution at sampling is excluded."""
    if lag:
        staleness = f"their own versions say that they are {lag} behind the trainer's: a stale sync is likely. "
    elif earlier:
        staleness = f"none of the {earlier} earlier checkpoints fits better: not a stale sync from one of these. "
    else:
        staleness = "a stale sync and wrong weights cannot be told apart without an earlier checkpoint. "
    near = "near relatives, such as weights of another step" if correlation >= RELATED else "little in common"
    return Cause(
        name="weights",
        text=f"the rollouts were sampled with other weights{'' if alone else OR_CHANGED_SAMPLING}: every hypothesis "
        f"leaves k3 {least:.2e} or more, and the probabilities correlate by {correlation:.3f} ({near})"
        f"{'' if differing is None else f'; {100 * differing:.0f}% of the live choices of experts differ'}. "
        f"{staleness.strip()}",
        remedy="give earlier checkpoints with --earlier; compare the digest and version that the engine's workers "
        "answer (`r3 doctor --url`) with the last sync's receipt; check that --model is the checkpoint that was served",
        figures={"k3": least, "correlation": correlation},
    )


CHANGES = "logit bias, allowed or bad words, structured output, a logits processor, several penalties at once"
OR_CHANGED_SAMPLING = (
    f", or from a distribution that was changed at sampling ({CHANGES}), which cannot be told without routing"
)


def adjusted(adjustment: Adjustment, declared: bool, without: float, with_it: float) -> Cause:
    source = "which the file's settings say" if declared else "which fits best"
    return Cause(
        name="adjusted",
        text=f"the logits were changed at sampling by {adjustment}, {source}, while the trainer scores the model's "
        f"own; {_times(without, with_it)}",
        remedy=SAMPLE_PLAINLY,
        figures={"adjustment": str(adjustment), "k3_without": without, "k3_with": with_it},
    )


def declared_adjustment(changes: Sequence[str], least: float, differing: float | None) -> Cause:
    experts = "" if differing is None else f"; {100 * differing:.1f}% of the live choices of experts differ"
    return Cause(
        name="adjusted",
        text=f"the file's settings say that sampling was also changed by {', '.join(changes)}, which cannot be "
        f"computed again here: k3 {least:.2e} or more remains{experts}. Whether the weights are the same cannot "
        "be told beside it",
        remedy=SAMPLE_PLAINLY,
        figures={"k3": least, "adjustment": ", ".join(changes)},
    )


def unknown_adjustment(least: float, differing: float) -> Cause:
    return Cause(
        name="adjusted",
        text=f"the distribution was changed at sampling: every hypothesis leaves k3 {least:.2e} or more, yet "
        f"{100 * (1 - differing):.1f}% of the live choices of experts are the rollouts', which other weights would not "
        f"make. It is none of the changes that were tried (one penalty, min-p, top-k, top-p, temperature): {CHANGES}; "
        "or weights behind the last router alone differ (the head, for one)",
        remedy=f"{SAMPLE_PLAINLY}; save the rollouts with SamplingSettings.of_params(sampling_params), which says it",
        figures={"k3": least, "differing_rows": differing},
    )


SAMPLE_PLAINLY = "sample without it (r3.capture.sampling_kwargs does), or change the trainer's logits alike"


def unexplained(remaining: float, floor: float, lag: int, earlier: int, replayed: bool) -> Cause:
    routing = "" if replayed else " Without the rollouts' routing, experts that differ are the likeliest: capture it."
    behind = f" The rollouts' versions are {lag} behind the trainer's." if lag else ""
    checkpoints = "" if earlier else " A stale sync by few steps looks so: give earlier checkpoints with --earlier."
    return Cause(
        name="unexplained",
        text=f"k3 {remaining:.2e} remains, {remaining / floor:.0f} times what the model's own precision makes, and no "
        f"hypothesis explains it.{routing}{behind}{checkpoints}",
        remedy="not tested here: quantised weights or KV cache, other kernels or position encoding, an adapter on one "
        f"side, changes of the distribution at sampling other than one penalty, min-p, top-k and top-p ({CHANGES})",
        figures={"k3": remaining, "own_k3": floor},
    )


def shifted_logprobs(shift: int, without: float, with_it: float) -> Cause:
    place = "after" if shift > 0 else "before"
    return Cause(
        name="shifted_logprobs",
        text=f"log-probabilities are shifted against the tokens: each token's own stands beside the token {place} it; "
        f"{_times(without, with_it)}",
        remedy="align them where rollouts are made: entry i of logprobs is of token i of token_ids",
        figures={"places": shift, "k3_without": without, "k3_with": with_it},
    )


def rows(shift: int | None, as_saved: float, live: float, moved: float, differing: Mapping[int, float]) -> Cause:
    figures: dict[str, float | str] = {"k3_as_saved": as_saved, "k3_live": live, "k3_moved": moved}
    gaps = f"replayed as they are k3 is {as_saved:.2e}, live {live:.2e}"
    share = {at: f"{100 * value:.0f}%" for at, value in differing.items()}
    if shift is None:
        return Cause(
            name="foreign_rows",
            text=f"the routing rows do harm: {gaps}, and moved by a position {moved:.2e}; {share.get(0)} of them "
            "differ from the live choices. They belong to other tokens, rollouts or layers, or to other weights",
            remedy="check how rows are put together: sample by sample, in the order of the tokens, all decoder layers",
            figures=figures,
        )
    place = "after" if shift > 0 else "before"
    return Cause(
        name="shifted_rows",
        text=f"the routing rows are shifted by one position: each token's row stands at the token {place} it. {gaps}, "
        f"moved back {moved:.2e}; {share.get(0)} of the rows differ from the live choices as they are, "
        f"{share.get(shift)} moved back",
        remedy="row t is of the token at position t, prompt included, and the token sampled last has none",
        figures=figures | {"places": shift},
    )


def renormalised(distribution: Distribution, without: float, with_it: float) -> Cause:
    truncation = distribution.truncation
    return Cause(
        name="renormalised",
        text=f"processed log-probabilities: they are renormalised over what {truncation} (about) leaves, while the "
        f"trainer scores the whole distribution; {_times(without, with_it)}",
        remedy="sample with top_p=1, top_k=-1 and min_p=0 (r3.capture.sampling_kwargs does), or renormalise in the "
        "trainer too",
        figures={
            "top_p": distribution.top_p,
            "top_k": distribution.top_k,
            "min_p": distribution.min_p,
            "k3_without": without,
            "k3_with": with_it,
        },
    )


def temperature(fitted: float, expected: float, declared: float | None, without: float, with_it: float) -> Cause:
    source = "which the file's settings say" if declared is not None else "for want of settings in the file"
    return Cause(
        name="temperature",
        text=f"the log-probabilities are those of temperature {fitted:.2f}; the model was scored at {expected:g}, "
        f"{source}; {_times(without, with_it)}",
        remedy=f"one side has another temperature than the other: divide the trainer's logits by {fitted:.2f} if that "
        "was asked of the engine, else look at what the requests, or the checkpoint's generation_config.json, set",
        figures={"temperature": fitted, "expected": expected, "k3_without": without, "k3_with": with_it},
    )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A distribution, in words, with the sampled tokens' evidence for it in nats of log-likelihood."""

    text: str
    nats: float
    figures: dict[str, float]


def raw(
    reported: Distribution,
    sampled: Sampled | None,
    expected: Distribution,
    without: float | None,
    with_it: float,
) -> Cause:
    figures: dict[str, float | str] = {"reported": str(reported), "k3_with": with_it}
    if without is not None:
        figures["k3_without"] = without
    if sampled is None:
        sampling = f"the file's settings say that {expected} was asked for"
        figures["sampled"] = str(expected)
    else:
        sampling = f"the tokens themselves speak for {sampled.text} (evidence of {sampled.nats:.0f} nats in all)"
        figures |= {"sampled": sampled.text, **sampled.figures}
    return Cause(
        name="raw_logprobs",
        text=f"raw log-probabilities: they are those of {reported}, and {sampling}. Ratios taken from them are not "
        "those of the distribution that was sampled from",
        remedy="start the engine with logprobs_mode=processed_logprobs (r3.capture.engine_kwargs and server_args do)",
        figures=figures,
    )


def hypothesis(tried: Hypothesis, names: Sequence[str]) -> str:
    parts = ["replayed" if tried.view.replayed else "live"]
    if tried.view.weights:
        parts.append(f"weights of {names[tried.view.weights]}")
    if tried.view.rows:
        parts.append(f"rows moved by {-tried.view.rows:+d}")
    if tried.shift:
        parts.append(f"log-probabilities moved by {-tried.shift:+d}")
    if tried.causes & {"temperature", "renormalised", "adjusted"}:
        parts.append(str(tried.distribution))
    return ", ".join(parts)
