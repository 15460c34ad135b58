"""Builds artefacts for a compile that runs in another process; run by `runner.build.ahead`.

    python -m runner.build.ahead_worker DESK PARENT_PID

It prints a line for every artefact when it is done, as JSON: the seconds, or null.
"""

import json
import os
import sys
from pathlib import Path

from parallel.launch import die_with_parent
from runner.build.ahead import build_in_turn

if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever else is printed goes to standard error.
    os.dup2(2, 1)
    for seconds in build_in_turn(Path(sys.argv[1])):
        print(json.dumps(seconds), file=answers, flush=True)
