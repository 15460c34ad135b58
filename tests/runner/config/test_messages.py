"""What a user reads: each mistake in a file, and the one line that it gives."""

from pathlib import Path

import pytest
from plan_file import plan

from parallel.errors import ConfigError
from runner.config.load import load
from runner.config.settings import Flag

HEAD = "version: 1\nmodel: {path: m}\n"


def lines(path: Path | None, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            HEAD + "parallel:\n  tensor_paralel_size: 2\n",
            "plan.yaml:4:3: parallel.tensor_paralel_size: unknown key; "
            "did you mean tensor_parallel_size?",
        ),
        (
            HEAD + "parallel: {tp: 2}\n",
            "plan.yaml:3:12: parallel.tp: unknown key; did you mean tensor_parallel_size?",
        ),
        (
            HEAD + "parallel:\n  stages: [{module: [a]}]\n",
            "plan.yaml:4:13: parallel.stages.0.module: unknown key; did you mean modules?",
        ),
        (
            HEAD + "parallel: {max_num_seqs: 2}\n",
            "plan.yaml:3:12: parallel.max_num_seqs: unknown key; it belongs under scheduler",
        ),
        (
            HEAD + "parallel: {modules: [a]}\n",
            "plan.yaml:3:12: parallel.modules: unknown key; it belongs under parallel.stages",
        ),
        (
            HEAD + "tp: 2\n",
            "plan.yaml:3:1: tp: unknown key; tensor_parallel_size belongs under parallel",
        ),
        (
            HEAD + "scheduler: {kv_cache: {}}\n",
            "plan.yaml:3:13: scheduler.kv_cache: unknown key; it belongs at the top level",
        ),
        (
            HEAD + "kv_cache: {max_num_seq: 3}\n",
            "plan.yaml:3:12: kv_cache.max_num_seq: unknown key; "
            "did you mean max_num_seqs, which belongs under scheduler?",
        ),
        (
            HEAD + "kv_cache: {colour: 3}\n",
            "plan.yaml:3:12: kv_cache.colour: unknown key; "
            "known here: gpu_memory_utilization, block_size",
        ),
        (
            HEAD + '"sched\\nuler\\e": {}\n',
            r"plan.yaml:3:1: sched\nuler\x1b: unknown key; did you mean scheduler?",
        ),
        (
            "version: 1\nmodel:\n  path: m\n  dtype: bf16\n",
            "plan.yaml:4:10: model.dtype: 'bf16' is not allowed; "
            "use auto, float32, bfloat16 or float16; did you mean bfloat16?",
        ),
        (
            "version: 1\nmodel: {path: m, dtype: flaot16}\n",
            "plan.yaml:2:25: model.dtype: 'flaot16' is not allowed; "
            "use auto, float32, bfloat16 or float16; did you mean float16?",
        ),
        (
            HEAD + "parallel: {device: gpu}\n",
            "plan.yaml:3:20: parallel.device: 'gpu' is not allowed; "
            "use auto, cpu or cuda; did you mean cuda?",
        ),
        (
            HEAD + "parallel: {device: CUDA}\n",
            "plan.yaml:3:20: parallel.device: 'CUDA' is not allowed; "
            "use auto, cpu or cuda; did you mean cuda?",
        ),
        (
            HEAD + 'parallel: {tensor_parallel_size: "4"}\n',
            "plan.yaml:3:34: parallel.tensor_parallel_size: '4' is a string; "
            "use a whole number, without quotes",
        ),
        (
            HEAD + "parallel: {tensor_parallel_size: 010}\n",
            "plan.yaml:3:34: parallel.tensor_parallel_size: '010' is a string; use a whole number",
        ),
        (
            HEAD + "parallel: {tensor_parallel_size: four}\n",
            "plan.yaml:3:34: parallel.tensor_parallel_size: 'four' is a string; use a whole number",
        ),
        (
            HEAD + "parallel: {tensor_parallel_size: 2.0}\n",
            "plan.yaml:3:34: parallel.tensor_parallel_size: 2.0 is a number with a fraction; "
            "use a whole number",
        ),
        (
            HEAD + "parallel: {tensor_parallel_size: true}\n",
            "plan.yaml:3:34: parallel.tensor_parallel_size: true is true or false; "
            "use a whole number",
        ),
        (
            HEAD + "parallel: {tensor_parallel_size: 0}\n",
            "plan.yaml:3:34: parallel.tensor_parallel_size: 0 is too small; use 1 or more",
        ),
        (
            HEAD + "parallel: {tensor_parallel_size: null}\n",
            "plan.yaml:3:34: parallel.tensor_parallel_size: null is not allowed; "
            "use a whole number",
        ),
        (
            "version: 1\nmodel: {path: m, max_model_len: x}\n",
            "plan.yaml:2:33: model.max_model_len: 'x' is a string; use a whole number or null",
        ),
        (
            "version: 1\nmodel: {path: [m]}\n",
            "plan.yaml:2:15: model.path: ['m'] is a list; use a string",
        ),
        ("version: 1\nmodel: {path: ''}\n", "plan.yaml:2:15: model.path: empty; give a value"),
        (
            HEAD + "parallel: {stages: {}}\n",
            "plan.yaml:3:20: parallel.stages: {} is a mapping; use a list or null",
        ),
        (
            HEAD + "parallel: {stages: []}\n",
            "plan.yaml:3:20: parallel.stages: empty; give at least one",
        ),
        (
            HEAD + "parallel: {stages: [3]}\n",
            "plan.yaml:3:21: parallel.stages.0: 3 is a whole number; use a mapping of keys",
        ),
        (
            HEAD + "parallel: {stages: [{devices: [a]}]}\n",
            "plan.yaml:3:32: parallel.stages.0.devices.0: 'a' is a string; use a whole number",
        ),
        (
            HEAD + "parallel: {stages: [{modules: [a]}, {devices: null}]}\n",
            "plan.yaml:3:37: parallel.stages.1.modules: missing, though another stage has them; "
            "name the modules of all stages or of none",
        ),
        (
            HEAD + "scheduler:\n",
            "plan.yaml:3:11: scheduler: null is not allowed; use a mapping of keys",
        ),
        (
            HEAD + "kv_cache: {gpu_memory_utilization: 0}\n",
            "plan.yaml:3:36: kv_cache.gpu_memory_utilization: 0 is too small; use a number above 0",
        ),
        (
            HEAD + "kv_cache: {gpu_memory_utilization: 90}\n",
            "plan.yaml:3:36: kv_cache.gpu_memory_utilization: 90 is too large; use 1 or less",
        ),
        (
            HEAD + "kv_cache: {block_size: 24}\n",
            "plan.yaml:3:24: kv_cache.block_size: 24 is not a power of two; use 16 or 32",
        ),
        (
            HEAD + "distributed: {init_timeout_s: 1e999}\n",
            "plan.yaml:3:31: distributed.init_timeout_s: inf is not finite; use a number",
        ),
        ("version: 2\nmodel: {path: m}\n", "plan.yaml:1:10: version: 2 is not allowed; use 1"),
        ("version: 1.0\nmodel: {path: m}\n", "plan.yaml:1:10: version: 1.0 is not allowed; use 1"),
        (
            "model: {path: m}\n",
            "plan.yaml: version: missing; it is needed: version of this language; write 1",
        ),
        (
            "version: 1\nmodel:\n  dtype: auto\n",
            "plan.yaml:2:1: model.path: missing; it is needed: local folder or file of the model, "
            "relative to the working directory; never a hub id",
        ),
        (
            "version: 1\n",
            "plan.yaml: model.path: missing; it is needed: local folder or file of the model, "
            "relative to the working directory; never a hub id",
        ),
        (
            "version: 1\nmodel: {path: meta-llama/Llama-3-8B}\n",
            "plan.yaml:2:15: model.path: no directory 'meta-llama/Llama-3-8B' in HERE; if this "
            "is a hub id: nothing is ever fetched, so download the model and give its local "
            "directory",
        ),
        (
            "version: 1\nmodel: {path: hf://gpt2}\n",
            "plan.yaml:2:15: model.path: no directory 'hf://gpt2' in HERE; if this is a hub "
            "id: nothing is ever fetched, so download the model and give its local directory",
        ),
        (
            "version: 1\nmodel: {path: /absent/model}\n",
            "plan.yaml:2:15: model.path: no directory '/absent/model'; "
            "give the local directory that holds the model",
        ),
        (
            "version: 1\nmodel: {path: plan.yaml}\n",
            "plan.yaml:2:15: model.path: 'plan.yaml' is not a directory; "
            "give the directory that holds the model",
        ),
    ],
)
def test_one_mistake_gives_one_line(text: str, line: str) -> None:
    assert lines(plan(text)) == [line.replace("HERE", str(Path.cwd()))]


def test_all_problems_are_listed_in_the_order_of_the_file() -> None:
    path = plan(
        "scheduler: {max_num_seqs: 0}\n"
        "model: {path: absent/model, dtype: x, dtype: y}\n"
        "2: two\n"
        "kv_cache: {block_size: -1, blocksize: 3}\n"
    )
    flags = {"parallel.tensor_parallel_size": Flag("-tp", 0)}
    starts = [
        "plan.yaml:1:27: scheduler.max_num_seqs: ",
        "plan.yaml:2:15: model.path: ",
        "plan.yaml:2:36: model.dtype: 'x'",
        "plan.yaml:2:39: model.dtype: given before, in line 2",
        "plan.yaml:3:1: a key must be text",
        "plan.yaml:4:24: kv_cache.block_size: ",
        "plan.yaml:4:28: kv_cache.blocksize: ",
    ]
    found = lines(path, flags=flags, overrides=["a"])
    assert len(found) == 10
    for line, start in zip(found, starts, strict=False):
        assert line.startswith(start)
    assert {line.split(": ")[0] for line in found[7:]} == {"plan.yaml", "-tp", "--set"}


def test_a_long_value_is_cut() -> None:
    (line,) = lines(plan(HEAD + f"parallel: {{device: {'x' * 500}}}\n"))
    assert "..." in line
    assert len(line) < 200


def test_flags_alone_give_lines_without_a_file() -> None:
    assert lines(None) == [
        "model.path: missing; it is needed: local folder or file of the model, "
        "relative to the working directory; never a hub id"
    ]
    flags = {"model.path": Flag("MODEL", "org/name"), "model.dtype": Flag("--dtype", "fp16")}
    first, last = lines(None, flags={"model.dtype": flags["model.dtype"]})
    assert first.startswith("--dtype: model.dtype: ")
    assert last.startswith("model.path: missing; ")
    dtype, path = sorted(lines(None, flags=flags))
    assert dtype.startswith("--dtype: model.dtype: 'fp16' is not allowed; use auto, float32")
    assert dtype.endswith("did you mean float16?")
    told = f"MODEL: model.path: no directory 'org/name' in {Path.cwd()}; if this is a hub id"
    assert path.startswith(told)


def test_a_flag_does_not_take_the_blame_for_what_is_missing() -> None:
    (line,) = lines(plan("version: 1\n"), flags={"model.dtype": Flag("--dtype", "auto")})
    assert line.startswith("plan.yaml: model.path: missing;")
