"""The README's first command does what the README says."""

from processes import ROOT, run_command


def test_demo_shows_the_plan_and_streams_text() -> None:
    done = run_command("--max-tokens", "8", launcher=[str(ROOT / "scripts" / "demo")])
    assert done.returncode == 0, done.stderr
    assert "model.layers.{25..29}, model.norm, lm_head" in done.stdout
    assert "The sky is blue" in done.stdout
    assert "3 ranks, tensor-parallel sizes [2, 1]" in done.stderr
