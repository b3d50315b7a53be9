"""Settings that must stand before torch and transformers are imported."""

import os

# No test may depend on a model hub: all models are made in the test or shipped with the examples.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test tensors are small: more threads gain nothing, and on a large host they make several ranks contend.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
