"""Loading: what wins over what, where each value came from, and flags that contradict the file."""

import re
from pathlib import Path

import pytest
from plan_file import plan

from parallel.errors import ConfigError
from runner.config.load import load
from runner.config.settings import Flag

HEAD = "version: 1\nmodel: {path: m}\n"
STAGES = HEAD + (
    "parallel:\n"
    "  tensor_parallel_size: 2\n"
    "  stages:\n"
    '    - {modules: ["a", "b.{0..3}"]}\n'
    '    - {modules: ["c"], tensor_parallel_size: 1}\n'
)


def tp(value: int | None) -> dict[str, Flag]:
    return {"parallel.tensor_parallel_size": Flag("--tensor-parallel-size", value)}


def pp(value: int | None) -> dict[str, Flag]:
    return {"parallel.pipeline_parallel_size": Flag("--pipeline-parallel-size", value)}


@pytest.mark.parametrize(
    ("file", "flag", "overrides", "value", "origin"),
    [
        ("", None, [], 1, "default"),
        ("parallel: {tensor_parallel_size: 2}\n", None, [], 2, "plan.yaml:3:34"),
        ("parallel: {tensor_parallel_size: 2}\n", 3, [], 3, "--tensor-parallel-size"),
        ("", 3, [], 3, "--tensor-parallel-size"),
        ("parallel: {tensor_parallel_size: 2}\n", 3, ["4"], 4, "--set"),
        ("parallel: {tensor_parallel_size: 2}\n", None, ["4"], 4, "--set"),
        ("", None, ["4", "5"], 5, "--set"),
    ],
)
def test_set_wins_over_flag_over_file_over_default(
    file: str,
    flag: int | None,
    overrides: list[str],
    value: int,
    origin: str,
) -> None:
    loaded = load(
        plan(HEAD + file),
        flags=tp(flag),
        overrides=[f"parallel.tensor_parallel_size={text}" for text in overrides],
    )
    assert loaded.config.parallel.tensor_parallel_size == value
    assert loaded.origins["parallel.tensor_parallel_size"] == origin


def test_flags_alone_make_a_config() -> None:
    loaded = load(None, flags={"model.path": Flag("MODEL", "m")} | tp(2))
    assert loaded.config.version == 1
    assert loaded.config.model.path == "m"
    assert loaded.config.parallel.tensor_parallel_size == 2
    assert loaded.origins["version"] == "default"
    assert loaded.origins["model.path"] == "MODEL"


def test_origins_cover_every_key_in_the_order_of_the_schema() -> None:
    loaded = load(plan(STAGES), overrides=["scheduler={max_num_seqs: 4}"])
    assert loaded.origins == {
        "version": "plan.yaml:1:10",
        "model.path": "plan.yaml:2:15",
        "model.format": "default",
        "model.factory": "default",
        "model.factory_path": "default",
        "model.factory_args": "default",
        "model.inputs": "default",
        "model.dims": "default",
        "model.preprocess.image.resize": "default",
        "model.preprocess.image.crop": "default",
        "model.preprocess.image.interpolation": "default",
        "model.preprocess.image.scale": "default",
        "model.preprocess.image.mean": "default",
        "model.preprocess.image.std": "default",
        "model.preprocess.image.channels": "default",
        "model.preprocess.image.layout": "default",
        "model.preprocess.volume.spacing": "default",
        "model.preprocess.volume.resample_to": "default",
        "model.preprocess.volume.window": "default",
        "model.preprocess.volume.pad_or_crop_to": "default",
        "model.dtype": "default",
        "model.load_format": "default",
        "model.max_model_len": "default",
        "parallel.tensor_parallel_size": "plan.yaml:4:25",
        "parallel.pipeline_parallel_size": "parallel.stages",
        "parallel.stages.0.modules": "plan.yaml:6:17",
        "parallel.stages.0.tensor_parallel_size": "default",
        "parallel.stages.0.devices": "default",
        "parallel.stages.1.modules": "plan.yaml:7:17",
        "parallel.stages.1.tensor_parallel_size": "plan.yaml:7:46",
        "parallel.stages.1.devices": "default",
        "parallel.split_points": "default",
        "parallel.tp_plan": "default",
        "parallel.device": "default",
        "compile.backend": "default",
        "compile.buckets": "default",
        "compile.enforce_eager": "default",
        "compile.allow_tf32": "default",
        "compile.parity.max_error_ratio": "default",
        "compile.parity.min_cosine": "default",
        "compile.parity.max_gain_error": "default",
        "compile.parity.min_top1": "default",
        "compile.parity.max_kl": "default",
        "compile.parity.num_tokens": "default",
        "scheduler.max_num_seqs": "--set",
        "scheduler.max_num_batched_tokens": "default",
        "scheduler.max_batch_size": "default",
        "scheduler.preferred_batch_size": "default",
        "scheduler.max_queue_delay_ms": "default",
        "scheduler.max_queue_size": "default",
        "kv_cache.gpu_memory_utilization": "default",
        "kv_cache.block_size": "default",
        "distributed.init_timeout_s": "default",
        "distributed.build_timeout_s": "default",
        "distributed.collective_timeout_s": "default",
        "distributed.all_reduce": "default",
        "tiling": "default",
        "server.host": "default",
        "server.port": "default",
        "server.uds": "default",
        "server.stall_timeout_s": "default",
        "server.model_name": "default",
        "server.api_key_file": "default",
        "server.max_request_bytes": "default",
        "server.request_timeout_s": "default",
        "server.shutdown_timeout_s": "default",
        "observability.nvtx": "default",
        "security.factories": "default",
        "security.network_guard": "default",
        "security.network_report": "default",
        "security.bundle_key": "default",
    }
    assert list(loaded.origins)[:3] == ["version", "model.path", "model.format"]
    assert loaded.config.parallel.pipeline_parallel_size == 2


def test_a_replaced_section_keeps_nothing_of_the_file() -> None:
    text = HEAD + "scheduler: {max_num_seqs: 7, max_num_batched_tokens: 9}\n"
    loaded = load(plan(text), overrides=["scheduler={max_num_seqs: 4}"])
    assert loaded.config.scheduler.max_num_batched_tokens == 8192
    assert loaded.origins["scheduler.max_num_batched_tokens"] == "default"


def test_set_changes_an_entry_of_a_list() -> None:
    loaded = load(
        plan(STAGES),
        overrides=["parallel.stages.1.tensor_parallel_size=3", 'parallel.stages.0.modules.1="x.*"'],
    )
    assert loaded.config.parallel.tensor_parallel_sizes == [2, 3]
    assert loaded.config.parallel.stages is not None
    assert loaded.config.parallel.stages[0].modules == ["a", "x.*"]
    assert loaded.origins["parallel.stages.1.tensor_parallel_size"] == "--set"


def test_set_null_and_values_that_hold_an_equals_sign() -> None:
    plan(STAGES)
    Path("a=b").mkdir()
    loaded = load(Path("plan.yaml"), overrides=["parallel.stages=null", "model.path=a=b"])
    assert loaded.config.parallel.stages is None
    assert loaded.config.model.path == "a=b"
    assert loaded.origins["parallel.stages"] == "--set"
    assert loaded.origins["parallel.pipeline_parallel_size"] == "default"


def tensor_model(dims: str = "") -> Path:
    Path("m.onnx").touch()
    shape = "[batch, 3, height, width]"
    head = "version: 1\nmodel:\n  path: m.onnx\n"
    return plan(f"{head}  inputs: [{{name: image, shape: {shape}}}]\n{dims}")


def test_set_changes_an_entry_of_a_mapping() -> None:
    path = tensor_model("  dims: {height: [320], width: [480]}\n")
    loaded = load(path, overrides=["model.dims.height=[320, 640]", "model.dims.width.0=512"])
    assert loaded.config.model.dims == {"height": [320, 640], "width": [512]}
    loaded = load(path, overrides=["model.dims.height=[320, 640]"])
    assert loaded.origins["model.dims.height"] == "--set"
    assert loaded.origins["model.dims.width"] == "plan.yaml:5:32"
    with pytest.raises(
        ConfigError, match=r"^--set: model\.dims\.height: 'x' is a string; use a li"
    ):
        load(path, overrides=["model.dims.height=x"])


def test_set_makes_a_mapping_that_the_file_does_not_have() -> None:
    overrides = ["model.dims.height=[320]", "model.dims.width=[480]"]
    loaded = load(tensor_model(), overrides=overrides)
    assert loaded.config.model.dims == {"height": [320], "width": [480]}
    overrides = [
        'model.factory="a:b"',
        "model.factory_args.block.depth=3",
        'parallel.tp_plan={"a.*.up": colwise}',
    ]
    loaded = load(tensor_model("  dims: {height: [320], width: [480]}\n"), overrides=overrides)
    assert loaded.config.model.factory_args == {"block": {"depth": 3}}
    assert loaded.config.parallel.tp_plan == {"a.*.up": "colwise"}
    assert loaded.origins["model.factory_args.block"] == "--set"
    assert loaded.origins["parallel.tp_plan.a.*.up"] == "--set"


def test_the_pipeline_size_follows_the_split_points() -> None:
    path = tensor_model("  dims: {height: [320], width: [480]}\n")
    loaded = load(path, overrides=["parallel.split_points=[a]"])
    assert loaded.origins["parallel.pipeline_parallel_size"] == "parallel.split_points"


def test_a_name_with_dots_is_not_taken_apart_in_silence() -> None:
    message = "--set: parallel.tp_plan.a: {'up': 'colwise'} is a mapping; use a string"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(plan(HEAD), overrides=["parallel.tp_plan.a.up=colwise"])


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("m", ""),
        ("m", "format: safetensors"),
        ("m", "load_format: dummy"),
        ("m", "factory: null"),
        ("m.onnx", "INPUTS"),
        ("m.pt2", "INPUTS"),
        ("model.bin", "format: onnx, INPUTS"),
        ("model.bin", "format: pt2, INPUTS"),
        ("model.bin", 'factory: "a:b", INPUTS'),
        ("m", 'factory: "a:b", load_format: dummy, INPUTS'),
        ("model.bin", 'factory: "a:b", load_format: dummy, INPUTS'),
    ],
)
def test_a_language_model_is_a_folder_and_a_tensor_model_a_file(path: str, keys: str) -> None:
    for name in ("m.onnx", "m.pt2", "model.bin"):
        Path(name).touch()
    keys = keys.replace("INPUTS", "inputs: [{name: x, shape: [batch]}]")
    text = f"version: 1\nmodel: {{path: {path}, {keys}}}\n"
    assert load(plan(text)).config.model.path == path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dtype", "'model.dtype' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("model..dtype=auto", "'model..dtype=auto' is not of the form key=value"),
        ("model.dtype=", "model.dtype has no value; write null for none"),
        ("model.dtype=[1", "model.dtype: bad YAML: expected ',' or ']'"),
        ("model.dtype=*x", "model.dtype: the alias *x is not read; write the value out"),
        ("model.dtype=!!str x", "model.dtype: the tag tag:yaml.org,2002:str is not read"),
        ("scheduler={max_num_seqs: 1, max_num_seqs: 2}", "scheduler.max_num_seqs: given before"),
        (
            "parallel.stages.2.devices=[1]",
            "parallel.stages: no entry '2' in this list; its indices are 0 to 1",
        ),
        (
            "parallel.stages.-1.devices=[1]",
            "parallel.stages: no entry '-1' in this list; its indices are 0 to 1",
        ),
        (
            "parallel.stages.x.devices=[1]",
            "parallel.stages: no entry 'x' in this list; its indices are 0 to 1",
        ),
        ("version.major=1", "version: is 1, so there is no major in it"),
        ("kv_cache.a.0.b=1", "kv_cache: a is not set, so it has no entry to change"),
        ("model.dtyp=auto", "model.dtyp: unknown key; did you mean dtype?"),
        ("model.max_model_len='4'", "model.max_model_len: '4' is a string"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(plan(STAGES + "kv_cache: {block_size: 16}\n"), overrides=[override])
    assert str(caught.value).startswith(f"--set: {message}")
    assert "\n" not in str(caught.value)


def test_an_entry_of_stages_that_the_file_does_not_have() -> None:
    with pytest.raises(ConfigError, match="--set: parallel: stages is not set, so it has no entry"):
        load(plan(HEAD), flags=tp(2), overrides=["parallel.stages.0.tensor_parallel_size=2"])


def test_a_pipeline_flag_that_contradicts_the_stages() -> None:
    message = (
        "--pipeline-parallel-size: parallel.pipeline_parallel_size: 3 contradicts the 2 entries"
    )
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(plan(STAGES), flags=pp(3))
    assert load(plan(STAGES), flags=pp(2)).config.parallel.pipeline_parallel_size == 2


def test_a_tensor_flag_that_contradicts_the_stages() -> None:
    message = (
        "--tensor-parallel-size: parallel.tensor_parallel_size: 4 contradicts "
        "parallel.stages.1.tensor_parallel_size=1 (plan.yaml:7:46); drop the flag or add "
        "--set parallel.stages.1.tensor_parallel_size=4"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(plan(STAGES), flags=tp(4))


@pytest.mark.parametrize(
    ("flag", "overrides", "sizes"),
    [
        (1, [], [1, 1]),
        (4, ["parallel.stages.1.tensor_parallel_size=4"], [4, 4]),
        (4, ["parallel.stages.1.tensor_parallel_size=3"], [4, 3]),
        (4, ["parallel.stages.1.tensor_parallel_size=null"], [4, 4]),
        (4, ["parallel.tensor_parallel_size=3"], [3, 1]),
        (None, [], [2, 1]),
    ],
)
def test_a_tensor_flag_that_agrees_or_is_overridden(
    flag: int | None, overrides: list[str], sizes: list[int]
) -> None:
    loaded = load(plan(STAGES), flags=tp(flag), overrides=overrides)
    assert loaded.config.parallel.tensor_parallel_sizes == sizes


def test_a_tensor_flag_must_fit_the_devices_of_the_file() -> None:
    text = HEAD + "parallel:\n  stages:\n    - devices: [0]\n"
    with pytest.raises(ConfigError, match=r"^plan.yaml:5:16: parallel.stages.0.devices: \[0\] has"):
        load(plan(text), flags=tp(2))
