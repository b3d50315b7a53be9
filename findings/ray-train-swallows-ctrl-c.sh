#!/usr/bin/env bash
# ray 2.60.0: `TorchTrainer.fit()`, as any Ray Train trainer's, leaves its handler of SIGINT behind. After it has returned,
# Ctrl-C is swallowed: the handler asks a controller that has finished to abort, which does nothing, and the script goes on
# with whatever comes after training. Only the third Ctrl-C ends the process, with status 0.
#
# Installs Ray in a temporary folder, lets a run end, sends SIGINT, and exits with 0 as long as nothing comes of it. Seen:
#     before fit: KeyboardInterrupt
#     after fit:  nothing
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "ray[train]==2.60.0"
cat >"$folder/train.py" <<'PY'
import os
import signal
import sys
import time

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # TorchTrainer's base, which needs no torch


def interrupted():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        return "KeyboardInterrupt"
    return "nothing"


print("before fit:", interrupted(), flush=True)
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
DataParallelTrainer(
    lambda: None, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=sys.argv[1])
).fit()
print("after fit: ", interrupted(), flush=True)
PY
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
"$folder/env/bin/python" -W ignore "$folder/train.py" "$folder/storage" >"$folder/said" 2>"$folder/log" || cat "$folder/log"
cat "$folder/said"
[[ $(<"$folder/said") == "before fit: KeyboardInterrupt"*"after fit:  nothing" ]]
