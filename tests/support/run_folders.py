"""Run folders with realistic numbers, made up from a seed: for the tests of what is read from them."""

import math
import random

from r3.diagnostics import RunFolder

# As a model might write it, and as somebody who wants to break the page would.
PIECES = (
    "The quick sum of 17 and 25 is 42, so the answer",
    "def area(r):\n\treturn 3.14159 * r ** 2\n\n# check",
    "</script><img src=x onerror=\"document.title='broken'\">",
    "naïve café, 中文字符 и кириллица",
    "<!-- not a comment --> & &amp; ' \" `",
    "\u202eright to left\u202c and \x00 a NUL, \ud800 half a pair",
    "x" * 400,
)


def step_metrics(step, rng, *, layers, experts, replay, steps, worse=1.0):
    tokens = rng.randint(90_000, 130_000)
    drift = (1 + 0.8 * step / max(steps, 20)) * worse
    metrics = {
        "reward/mean": 0.9 / (1 + math.exp(-(step - steps / 2) / (steps / 6 + 1))) + rng.gauss(0, 0.02),
        "eval/reward": 0.9 / (1 + math.exp(-(step - steps / 2) / (steps / 6 + 1))),
        "reward/std_in_group": 0.3 + rng.gauss(0, 0.02),
        "rollout/tokens_mean": tokens / 256,
    }
    if step == 1:
        metrics |= {"engine/k3_live": 5e-4, "engine/repeat_nats": 0.0}
        if replay:
            metrics |= {"engine/k3_replayed": 8e-5, "engine/differing_rows": 0.04}
    for side, k3 in (("live", 5.04e-4), ("replayed", 8.05e-5)):
        if side == "replayed" and not replay:
            continue
        k3 *= drift * rng.lognormvariate(0, 0.15)
        size = math.sqrt(2 * k3)
        metrics |= {
            f"logprob_diff/{side}/{name}": value
            for name, value in {
                "tokens": tokens,
                "abs_mean": 0.34 * size,
                "abs_p50": 0.1 * size,
                "abs_p99": 3.6 * size,
                "abs_max": (1.25 if side == "live" else 0.33) * rng.lognormvariate(0, 0.25) * math.sqrt(drift),
                "k1": rng.gauss(0, 1e-4),
                "k3": k3,
                "chi2_token": 2.2 * k3,
                "ess": 1 - 2 * k3,
                "extreme_frac": rng.choice([1, 2, 3]) * 4e-5 * drift if side == "live" else rng.choice([0, 0, 1e-5]),
            }.items()
        }
    shares = {
        layer: (0.012 + 0.075 * layer / layers) * drift**0.5 * rng.lognormvariate(0, 0.06) for layer in range(layers)
    }
    metrics |= {f"routing/differing_rows/layer_{layer:02d}": share for layer, share in shares.items()}
    rows = tokens * 2
    return metrics | {
        "routing/differing_rows": sum(shares.values()) / layers,
        "routing/differing_tokens": 1 - math.prod(1 - share for share in shares.values()),
        "routing/jaccard": 1 - sum(shares.values()) / layers * 0.22,
        "routing/load_entropy/live": 0.96 - 0.01 * drift + rng.gauss(0, 0.002),
        "routing/load_entropy/rollout": 0.96 - 0.01 * drift + rng.gauss(0, 0.002),
        "routing/load_max/live": 2.6 + 0.4 * drift + rng.gauss(0, 0.1),
        "routing/load_max/rollout": 2.6 + 0.4 * drift + rng.gauss(0, 0.1),
        "routing/load_shift": 0.006 * drift,
        "routing/rank_load_max/live": 1.1 + rng.gauss(0, 0.02),
        "routing/rank_load_max/rollout": 1.1 + rng.gauss(0, 0.02),
        "routing/margin/agreeing_p50": 0.02,
        "routing/margin/differing_p50": 0.0006 * rng.lognormvariate(0, 0.1),
        "routing/coverage": 1 - abs(rng.gauss(0, 0.0005)),
        "routing/rows_captured": rows,
        "routing/rows_replayed": rows,
        "routing/rows_live": 256,
        "routing/version_lag_mean": rng.choice([0.0, 0.0, 0.3]),
        "routing/version_lag_max": rng.choice([0, 0, 1]),
        "train/loss": rng.gauss(0, 0.01),
        "train/grad_norm": rng.lognormvariate(-1, 0.3),
        "sync/version": step,
        "sync/bytes": 57_000_000_000,
        "sync/chunks": 120,
        "sync/seconds": 1.9 * rng.lognormvariate(0, 0.05),
        "time/rollout_s": 41 * rng.lognormvariate(0, 0.1),
        "time/measure_s": 9 * rng.lognormvariate(0, 0.05),
        "time/train_s": 63 * rng.lognormvariate(0, 0.05),
        "time/sync_s": 2.2 * rng.lognormvariate(0, 0.05),
    }


def details(rng, *, layers, experts, replay, worse=1.0):
    rollout = [-rng.expovariate(1) * rng.choice([0.01, 0.5, 2]) for _ in range(1024)]
    spread = {"live": 0.03 * worse, "replayed": 0.012 * worse}

    def diff(side):
        return rng.gauss(0, spread[side]) * (9 if rng.random() < 0.01 else 1)

    tokens = {"rollout": rollout}
    for side in spread:
        tokens[side] = [min(p + diff(side), -1e-6) for p in rollout] if replay or side == "live" else None
    worst = []
    for row in range(16):
        p = -1.0 - 4 * rng.random()
        d = (0.33 - 0.015 * row) * rng.choice([-1, 1])
        worst.append(
            {
                "sample": rng.randrange(256),
                "position": rng.randrange(700),
                "token_id": rng.randrange(50_000),
                "token": rng.choice([" answer", "\n", "42", "</script>", "<b>"]) if row else PIECES[2],
                "before": PIECES[row % len(PIECES)],
                "after": PIECES[(row + 1) % len(PIECES)],
                "live": p + 2.5 * d,
                "replayed": p + d if replay else None,
                "rollout": p,
                "layers": sorted(rng.sample(range(layers), rng.randrange(min(layers, 20)))),
            }
        )
    weights = [[rng.lognormvariate(0, 0.35) for _ in range(experts)] for _ in range(layers)]
    load = [[int(20_000 * weight) for weight in row] for row in weights]
    moved = [[int(count * rng.lognormvariate(0, 0.02)) for count in row] for row in load]
    return {
        "tokens": tokens,
        "tokens_seen": 110_000,
        "tokens_left_out": 0,
        "worst": worst,
        "histogram": {side: histogram(rng, spread[side]) if tokens[side] else None for side in spread},
        "load": {"layer_ids": list(range(layers)), "live": moved, "rollout": load},
    }


def histogram(rng, spread, tokens=20_000):
    """Bins of a factor of 2**(1/4), as the sums have them."""
    counts = {}
    for _ in range(tokens):
        d = rng.gauss(0, spread) * rng.choice([0.01, 0.1, 0.3, 1]) * (9 if rng.random() < 1e-3 else 1)
        octave = math.floor(4 * math.log2(abs(d))) if d else -200
        counts[octave, d > 0] = counts.get((octave, d > 0), 0) + 5
    bins = [(2 ** (o / 4), 2 ** ((o + 1) / 4), n, positive) for (o, positive), n in counts.items()]
    return sorted([lower, upper, n] if positive else [-upper, -lower, n] for lower, upper, n, positive in bins)


SETTINGS = {
    "trainer.seed": 42,
    "trainer.policy.model.path": "org/model-30b-a3b",
    "trainer.policy.optimizer_config.lr": 1e-6,
    "trainer.policy.fsdp_config.moe_enable_routing_replay": True,
    "trainer.diagnostics.every": 1,
    "trainer.diagnostics.details_every": 10,
    "generator.inference_engine.dtype": "bfloat16",
    "generator.sampling_params.temperature": 1.0,
    "task.settings": {"digits": [1, 2, 3], "note": "a & b < c"},
}


def synthetic_run(
    path, steps, *, seed=0, layers=24, experts=64, replay=True, details_every=10, settings=None, worse=1.0, metrics=None
):
    """A folder of a run of `steps` steps; `worse` scales its gap, `metrics(step, record)` changes a record."""
    rng = random.Random(seed)
    folder = RunFolder(path, SETTINGS if settings is None else settings)
    for step in range(1, steps + 1):
        record = step_metrics(step, rng, layers=layers, experts=experts, replay=replay, steps=steps, worse=worse)
        folder.log(step, metrics(step, record) if metrics else record)
        if details_every and (step % details_every == 0 or step == 1):
            folder.log_details(step, details(rng, layers=layers, experts=experts, replay=replay, worse=worse))
    return folder.path


def few_metrics(step, layers=(1, 2, 3, 10, 100)):
    metrics = {"reward/mean": 0.1 * step, "routing/differing_rows": 0.05, "routing/differing_tokens": 0.3}
    for side, scale in (("live", 6e-4), ("replayed", 1e-4)):
        metrics |= {
            f"logprob_diff/{side}/k3": scale * step,
            f"logprob_diff/{side}/k1": -scale,
            f"logprob_diff/{side}/abs_mean": 10 * scale,
            f"logprob_diff/{side}/abs_max": 1000 * scale,
            f"logprob_diff/{side}/extreme_frac": 0.0,
        }
    metrics |= {f"routing/differing_rows/layer_{layer:02d}": 0.0007 * layer for layer in layers}
    metrics |= {"routing/rows_replayed": 1000, "routing/rows_live": 7, "sync/version": step, "sync/bytes": 3 * 2**20}
    return metrics | {"sync/seconds": 0.25, "time/rollout_s": 12.0, "time/train_s": 7.5, "time/sync_s": 0.5}
