"""Builds artefacts for a compile that runs in another process; started by `BuildProcess`.

    python -m runner.build.ahead_worker DEVICE PARENT_PID BACKEND ...

It reads a line for every artefact that it is to build, an `Order`, and prints an `Answer` when that
is done, both as JSON.
"""

import json
import os
import sys
from dataclasses import asdict

import torch

from parallel.launch import die_with_parent
from runner.build.build_process import build_ordered

if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Compilers that are called shall read no order, and what they print goes to standard error.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for answer in build_ordered(torch.device(sys.argv[1]), sys.argv[3:], orders):
        print(json.dumps(asdict(answer)), file=answers, flush=True)
