"""docker/shardline.service: what systemd makes of its command line."""

import shlex

from processes import ROOT


def test_gpus_with_commas_reach_docker_as_one_word() -> None:
    text = (ROOT / "docker" / "shardline.service").read_text().replace("\\\n", "")
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    words = shlex.split(line.removeprefix("ExecStart="))
    # systemd puts variables into words, and does not split what they hold.
    assert words[words.index("--gpus") + 1] == '"${GPUS}"'
