"""What a training loop records of a step beside the sums: rewards, updates, the sync and times.

Declared here, and not in a trainer, because the report shows them of any loop that uses these names.
"""

from __future__ import annotations

from r3.diagnostics.metric import SCHULMAN, Chart, Metric

STEP_METRICS = (
    Metric(
        name="reward/mean",
        formula="mean reward of the step's rollouts",
        chart=Chart(
            section="training",
            title="Reward",
            unit="mean reward",
            caption="Mean over the step's rollouts.",
            label="mean reward",
        ),
    ),
    Metric(name="reward/std_in_group", formula="mean over prompts of the standard deviation of their rewards"),
    Metric(
        name="eval/reward",
        formula="mean reward of one completion of each held-out problem, after the step",
        notes="at evaluated steps",
        chart=Chart(
            section="training",
            title="Reward of held-out problems",
            unit="mean reward",
            caption="Mean over problems that training does not see, one completion each.",
            label="held-out reward",
        ),
    ),
    Metric(name="rollout/tokens_mean", formula="mean number of sampled tokens in a rollout", unit="tokens"),
    Metric(
        name="rollout/set_size_mean",
        formula="mean number of ids that a token was sampled from, where top_k, top_p or min_p are set",
        unit="tokens",
    ),
    Metric(
        name="rollout/set_single_frac",
        formula="share of sampled tokens that were the only one left, where top_k, top_p or min_p are set",
    ),
    Metric(
        name="rollout/set_mass_mean",
        formula="mean share of the trainer's own distribution that the ids hold which a token was sampled from",
        notes="at measured steps, where top_k, top_p or min_p are set; near the engine's before the first update",
    ),
    Metric(
        name="rollout/set_mass_min",
        formula="the smallest of these shares",
        notes="where it falls towards 0 the policy moves to tokens that were not sampled from, which get no gradient",
    ),
    Metric(
        name="routing/rows_replayed",
        formula="rows whose routing was replayed in training in every layer",
        unit="tokens",
    ),
    Metric(name="routing/rows_live", formula="the others, routed live where it is missing", unit="tokens"),
    Metric(
        name="routing/pairs_live",
        formula="(token, layer) pairs routed live in training",
        unit="pairs",
        notes="L for a row without routing, fewer for one that lacks some layers",
    ),
    Metric(
        name="train/loss",
        formula="loss, mean over the sampled tokens",
        notes="with `correction=gspo` over the sequences",
    ),
    Metric(name="train/lr", formula="learning rate of the step's updates", unit="per update"),
    Metric(name="train/grad_norm", formula="norm of the gradient before it is clipped, mean over the updates"),
    Metric(name="train/clipped_frac", formula="share of the sampled tokens whose ratio is outside the clip bounds"),
    Metric(
        name="train/kl",
        formula="exp(d) - 1 - d, mean over the sampled tokens; d = reference - policy",
        unit="nats",
        notes="with `kl_coef` only; the reference is routed live, so that it holds the routing gap too",
        source=SCHULMAN,
    ),
    Metric(name="train/updates", formula="updates of the step", unit="updates"),
    Metric(name="sync/version", formula="version that the step's weight sync committed", unit=""),
    Metric(name="sync/bytes", formula="size of that sync", unit="bytes"),
    Metric(name="sync/chunks", formula="chunks that it was sent in", unit="chunks"),
    Metric(
        name="sync/seconds",
        formula="its duration",
        unit="s",
        chart=Chart(
            section="training",
            title="Weight sync",
            unit="seconds",
            caption="Duration of each complete update, from its begin to its commit.",
            from_zero=True,
            colour="fourth",
        ),
    ),
    Metric(
        name="time/{rollout,measure,train,sync,eval}_s",
        formula="duration of each phase",
        unit="s",
        notes="`rollout`: the wait for rollouts, which with `trainer.max_staleness` are sampled while another step "
        "trains; `measure`: the two forwards that compare live and replayed, at measured steps",
    ),
)
