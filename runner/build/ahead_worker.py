"""Builds artefacts for a compile that runs in another process; started by `BuildProcess`.

    python -m runner.build.ahead_worker DEVICE PARENT_PID

It reads a line for every artefact that it is to build, and prints one when that is done, as JSON:
the seconds, or null.
"""

import json
import os
import sys

import torch

from parallel.launch import die_with_parent
from runner.build.build_process import build_ordered

if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever else is printed goes to standard error.
    os.dup2(2, 1)
    for seconds in build_ordered(torch.device(sys.argv[1]), sys.stdin):
        print(json.dumps(seconds), file=answers, flush=True)
