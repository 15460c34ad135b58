"""The schema by itself: defaults, strictness, and values that must agree."""

from typing import Any

import pytest
from pydantic import ValidationError

from parallel.styles import REPLICATE, STYLES
from runner.config.fields import field_at, section_of, walk
from runner.config.model_schema import ModelConfig
from runner.config.parallel_schema import TP_STYLES, ParallelConfig, StageConfig
from runner.config.schema import RunnerConfig

MINIMAL: dict[str, Any] = {"version": 1, "model": {"path": "/m"}}


def test_defaults_are_those_that_the_documentation_promises() -> None:
    config = RunnerConfig.model_validate(MINIMAL)
    assert config.model_dump() == {
        "version": 1,
        "model": {
            "path": "/m",
            "format": "auto",
            "factory": None,
            "factory_path": None,
            "factory_args": {},
            "inputs": None,
            "dims": {},
            "preprocess": {
                "image": {
                    "resize": None,
                    "crop": None,
                    "interpolation": "bilinear",
                    "scale": 1 / 255,
                    "mean": None,
                    "std": None,
                    "channels": "rgb",
                    "layout": "chw",
                },
                "volume": {
                    "spacing": None,
                    "resample_to": None,
                    "window": None,
                    "pad_or_crop_to": None,
                },
            },
            "dtype": "auto",
            "load_format": "auto",
            "max_model_len": None,
        },
        "parallel": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "stages": None,
            "split_points": None,
            "tp_plan": None,
            "device": "auto",
        },
        "compile": {
            "backend": "tensorrt",
            "buckets": None,
            "enforce_eager": False,
            "allow_tf32": False,
            "parity": {
                "max_error_ratio": 4.0,
                "min_cosine": 0.999,
                "max_gain_error": 0.02,
                "min_top1": 0.99,
                "max_kl": 0.02,
                "num_tokens": 128,
            },
        },
        "scheduler": {
            "max_num_seqs": 32,
            "max_num_batched_tokens": 8192,
            "max_batch_size": 8,
            "preferred_batch_size": None,
            "max_queue_delay_ms": 5.0,
            "max_queue_size": 256,
        },
        "kv_cache": {"gpu_memory_utilization": 0.9, "block_size": 16},
        "distributed": {
            "init_timeout_s": 300.0,
            "build_timeout_s": 7200.0,
            "collective_timeout_s": None,
            "all_reduce": "auto",
        },
        "tiling": None,
        "server": {
            "host": "127.0.0.1",
            "port": 8000,
            "uds": None,
            "stall_timeout_s": None,
            "model_name": None,
            "api_key_file": None,
            "max_request_bytes": 2097152,
            "request_timeout_s": None,
            "shutdown_timeout_s": 60.0,
        },
        "observability": {"nvtx": False},
        "security": {
            "factories": [],
            "network_guard": "off",
            "network_report": None,
            "bundle_key": None,
        },
    }


def test_every_default_passes_its_own_checks() -> None:
    config = RunnerConfig.model_validate(MINIMAL)
    assert RunnerConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("model", {"path": "/m", "max_model_len": "4"}),
        ("model", {"path": "/m", "max_model_len": 4.0}),
        ("model", {"path": "/m", "max_model_len": True}),
        ("model", {"path": "/m", "max_model_len": 0}),
        ("model", {"path": ""}),
        ("model", {"path": 3}),
        ("model", {"path": "/m", "dtype": None}),
        ("parallel", {"tensor_parallel_size": 0}),
        ("parallel", {"stages": []}),
        ("parallel", {"stages": [{"modules": []}]}),
        ("parallel", {"stages": [{"devices": []}]}),
        ("parallel", {"stages": [{"devices": [-1]}]}),
        ("parallel", {"stages": [{"tensor_parallel_size": 0}]}),
        ("scheduler", {"max_num_seqs": 0}),
        ("scheduler", {"max_num_batched_tokens": 0}),
        ("scheduler", {"max_batch_size": 0}),
        ("scheduler", {"max_queue_delay_ms": -0.1}),
        ("scheduler", {"max_queue_size": 0}),
        ("tiling", {}),
        ("tiling", {"roi_size": [64]}),
        ("tiling", {"roi_size": [64, 64, 64, 64]}),
        ("tiling", {"roi_size": [64, 0]}),
        ("tiling", {"roi_size": [64, 64], "overlap": 1.0}),
        ("tiling", {"roi_size": [64, 64], "sigma_scale": 0}),
        ("security", {"factories": [""]}),
        ("kv_cache", {"gpu_memory_utilization": 0.0}),
        ("kv_cache", {"gpu_memory_utilization": 1.01}),
        ("kv_cache", {"gpu_memory_utilization": float("nan")}),
        ("kv_cache", {"block_size": 24}),
        ("kv_cache", {"block_size": 0}),
        ("distributed", {"init_timeout_s": 0}),
        ("distributed", {"collective_timeout_s": float("inf")}),
        ("version", 2),
        ("version", True),
        ("version", 1.0),
        ("version", "1"),
        ("extra", {}),
    ],
)
def test_refuses(section: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        RunnerConfig.model_validate(MINIMAL | {section: value})


@pytest.mark.parametrize("block_size", [1, 2, 16, 256])
def test_accepts_powers_of_two_and_whole_numbers_for_fractions(block_size: int) -> None:
    data = MINIMAL | {
        "kv_cache": {"block_size": block_size, "gpu_memory_utilization": 1},
        "distributed": {"init_timeout_s": 5},
    }
    config = RunnerConfig.model_validate(data)
    assert config.kv_cache.block_size == block_size
    assert config.kv_cache.gpu_memory_utilization == 1.0
    assert config.distributed.init_timeout_s == 5.0


def test_a_config_cannot_be_changed() -> None:
    config = RunnerConfig.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.scheduler.max_num_seqs = 3


@pytest.mark.parametrize(
    "pattern", ["lm_head", "model.layers.*", "model.layers.{0..40}", "h.{3..3}.mlp", "*", "a-b.c"]
)
def test_accepts_module_pattern(pattern: str) -> None:
    assert StageConfig(modules=[pattern]).modules == [pattern]


@pytest.mark.parametrize(
    "pattern",
    ["model..norm", ".a", "a.", "layers*", "layers.{4..1}", "layers.{0-3}", "a.{0..}", "{", "a b"],
)
def test_refuses_module_pattern(pattern: str) -> None:
    with pytest.raises(ValidationError, match="is not a pattern of module names"):
        StageConfig(modules=["lm_head", pattern])


def test_sizes_of_equal_stages() -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3)
    assert parallel.tensor_parallel_sizes == [2, 2, 2]
    assert parallel.devices is None


def test_sizes_and_devices_of_uneven_stages() -> None:
    stages = [
        StageConfig(modules=["a"], devices=[5, 4]),
        StageConfig(modules=["b"], tensor_parallel_size=1, devices=[0]),
    ]
    parallel = ParallelConfig(tensor_parallel_size=2, stages=stages)
    assert parallel.tensor_parallel_sizes == [2, 1]
    assert parallel.devices == [5, 4, 0]
    assert parallel.pipeline_parallel_size == 2


@pytest.mark.parametrize(
    ("parallel", "fault"),
    [
        (
            {"pipeline_parallel_size": 1, "stages": [{}, {}]},
            "pipeline_parallel_size: 1 contradicts the 2 entries",
        ),
        (
            {"stages": [{"modules": ["a"]}, {}]},
            "stages.1.modules: missing, though another stage has them",
        ),
        (
            {"stages": [{"devices": [0]}, {}]},
            "stages.1.devices: missing, though another stage has them",
        ),
        (
            {"stages": [{"devices": [0, 1]}]},
            r"stages.0.devices: \[0, 1\] has 2 devices for tensor_parallel_size=1",
        ),
        (
            {"tensor_parallel_size": 2, "stages": [{"devices": [0]}]},
            r"stages.0.devices: \[0\] has 1 devices for tensor_parallel_size=2",
        ),
        (
            {"stages": [{"tensor_parallel_size": 2, "devices": [1, 1]}]},
            "stages.0.devices: device 1 is given twice",
        ),
        (
            {"stages": [{"devices": [3]}, {"devices": [3]}]},
            "stages.1.devices: device 3 is given twice",
        ),
    ],
)
def test_stages_that_do_not_agree(parallel: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ParallelConfig.model_validate(parallel)


def test_the_pipeline_size_may_repeat_the_number_of_stages() -> None:
    given = {"pipeline_parallel_size": 2, "stages": [{}, {"tensor_parallel_size": 3}]}
    assert ParallelConfig.model_validate(given).tensor_parallel_sizes == [1, 3]


@pytest.mark.parametrize(
    ("given", "found", "kind"),
    [
        ({"path": "/m"}, "safetensors", "decoder"),
        ({"path": "/m.safetensors"}, "safetensors", "decoder"),
        ({"path": "/m", "format": "safetensors"}, "safetensors", "decoder"),
        ({"path": "/m.onnx"}, "onnx", "graph"),
        ({"path": "/m.pt2"}, "pt2", "graph"),
        ({"path": "/m", "factory": "a:b"}, "factory", "graph"),
        ({"path": "/m.onnx", "factory": "a:b"}, "factory", "graph"),
        ({"path": "/m", "format": "onnx"}, "onnx", "graph"),
        ({"path": "/m.onnx", "format": "pt2"}, "pt2", "graph"),
        ({"path": "/m.onnx", "format": "safetensors"}, "safetensors", "decoder"),
    ],
)
def test_what_a_model_is_follows_from_names(given: dict[str, Any], found: str, kind: str) -> None:
    inputs = [{"name": "x", "shape": ["batch", 3]}] if kind == "graph" else None
    model = ModelConfig.model_validate(given | {"inputs": inputs})
    assert (model.resolved_format, model.kind) == (found, kind)


@pytest.mark.parametrize("shape", [[], [1], ["batch"], ["batch", 3, "n"], ["n", 2, "n"]])
def test_accepts_sizes_and_names_as_a_shape(shape: list[Any]) -> None:
    dims = {"n": [1, 2]} if "n" in shape else {}
    inputs = [{"name": "x", "shape": shape}]
    model = ModelConfig.model_validate({"path": "/m.onnx", "inputs": inputs, "dims": dims})
    assert model.inputs is not None
    assert model.inputs[0].shape == shape


def test_the_pipeline_size_follows_the_split_points() -> None:
    assert ParallelConfig(split_points=["a", "b"]).pipeline_parallel_size == 3
    stages = [StageConfig(), StageConfig(tensor_parallel_size=2)]
    parallel = ParallelConfig(split_points=["a"], stages=stages)
    assert parallel.tensor_parallel_sizes == [1, 2]


def test_every_style_of_a_tp_plan_is_accepted() -> None:
    plan = {f"m{index}": style for index, style in enumerate(TP_STYLES)}
    assert ParallelConfig(tp_plan=plan).tp_plan == plan


def test_every_key_is_described_in_one_sentence() -> None:
    for path in walk(RunnerConfig):
        field = field_at(RunnerConfig, path)
        assert field is not None
        section = section_of(field.annotation)
        text = field.description or (section.__doc__ if section else None)
        assert text, path
        assert text.endswith("."), path
        assert ". " not in text, path


def test_json_schema_holds_limits_and_refuses_unknown_keys() -> None:
    schema = RunnerConfig.model_json_schema()
    assert schema["required"] == ["version", "model"]
    assert schema["additionalProperties"] is False
    utilization = schema["$defs"]["KVCacheConfig"]["properties"]["gpu_memory_utilization"]
    assert (utilization["exclusiveMinimum"], utilization["maximum"]) == (0, 1)
    assert schema["$defs"]["ModelConfig"]["properties"]["dtype"]["default"] == "auto"


def test_the_styles_are_those_that_layers_are_split_by() -> None:
    assert set(TP_STYLES) == {*STYLES, REPLICATE}
