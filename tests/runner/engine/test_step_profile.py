"""Which steps a trace holds."""

import json
from pathlib import Path

from parallel.annotate import for_torch
from runner.engine.step_profile import StepProfile


def steps_of(file: Path, *, rounds: int, steps: int, max_steps: int) -> list[str]:
    """The steps in the trace of the second round."""
    profile = StepProfile(file, round_index=1, num_steps=max_steps)
    for round_ in range(rounds):
        profile.begin_round()
        for step in range(steps):
            with for_torch("step", [round_, step]):
                pass
            profile.end_step()
    profile.close()
    events = json.loads(file.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_the_first_steps_of_the_round(tmp_path: Path) -> None:
    found = steps_of(tmp_path / "t.json", rounds=2, steps=4, max_steps=2)
    assert found == ["step 1, 0", "step 1, 1"]


def test_no_step_of_the_next_round(tmp_path: Path) -> None:
    found = steps_of(tmp_path / "t.json", rounds=3, steps=2, max_steps=9)
    assert found == ["step 1, 0", "step 1, 1"]
