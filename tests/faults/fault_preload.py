"""What every sender of the fault tests is forked from: imports done, and all sets of weights in memory."""

import os

import torch
from fault_sender import weights

torch.set_num_threads(1)  # a fork has no use for another process's threads
for which in "ABC":
    for fused in (False, True):
        weights(os.environ["R3_TEST_FAULTS_MODEL"], which, fused)
