"""How far rollout and trainer are apart: mergeable metrics, corrections, alarms, sinks, and the run folder."""

from r3.diagnostics.alarms import Alarm, Alarms, find_alarms
from r3.diagnostics.correction_sums import CorrectionSums
from r3.diagnostics.corrections import (
    Correction,
    geometric_mask,
    gspo,
    icepop,
    masked_importance,
    product_mask,
    truncated_importance,
)
from r3.diagnostics.coverage import CoverageSums
from r3.diagnostics.details import TokenDetails
from r3.diagnostics.expert_load import LoadSums
from r3.diagnostics.initial_mismatch import EngineAgreement
from r3.diagnostics.logprobs import LogprobSums, compare_logprobs
from r3.diagnostics.margins import MarginSums
from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.rank_load import rank_load_metrics
from r3.diagnostics.routing_agreement import RoutingSums, compare_routing
from r3.diagnostics.run_folder import RunFolder, read_details, read_metrics, read_settings
from r3.diagnostics.run_reader import Run, read_run
from r3.diagnostics.sequences import SequenceSums, sequence_totals
from r3.diagnostics.sinks import Sinks, open_sinks, require_sinks

__all__ = [
    "Alarm",
    "Alarms",
    "Correction",
    "CorrectionSums",
    "CoverageSums",
    "EngineAgreement",
    "LoadSums",
    "LogprobSums",
    "MarginSums",
    "MergeableSums",
    "RoutingSums",
    "Run",
    "RunFolder",
    "SequenceSums",
    "Sinks",
    "TokenDetails",
    "compare_logprobs",
    "compare_routing",
    "find_alarms",
    "geometric_mask",
    "gspo",
    "icepop",
    "masked_importance",
    "open_sinks",
    "product_mask",
    "rank_load_metrics",
    "read_details",
    "read_metrics",
    "read_run",
    "read_settings",
    "require_sinks",
    "sequence_totals",
    "truncated_importance",
]
