"""The listing of effective values, for people and for programs."""

import json
from pathlib import Path

from plan_file import plan

from runner.config.load import load
from runner.config.schema import RunnerConfig
from runner.config.settings import Flag
from runner.config.show import as_json, show

TEXT = """\
version: 1
model: {path: m}
parallel:
  stages:
    - {modules: ["a.{0..1}", b], devices: [3]}
"""

TENSOR_TEXT = """\
version: 1
model:
  path: w.bin
  factory: "a:b"
  inputs: [{name: image, shape: [batch, 3, height]}]
  factory_args: {depth: 3}
  dims: {height: [320, 640]}
tiling: {roi_size: [64, 64]}
"""


def test_each_value_stands_in_one_aligned_line_with_its_origin() -> None:
    flags = {"scheduler.max_num_seqs": Flag("--max-num-seqs", 4)}
    loaded = load(plan(TEXT), flags=flags, overrides=["kv_cache.block_size=32"])
    assert show(loaded).splitlines() == [
        "version                                 1                    plan.yaml:1:10",
        "model.path                              m                    plan.yaml:2:15",
        "model.format                            auto                 default",
        "model.factory                           null                 default",
        "model.factory_path                      null                 default",
        "model.factory_args                      {}                   default",
        "model.inputs                            null                 default",
        "model.dims                              {}                   default",
        "model.preprocess.image.resize           null                 default",
        "model.preprocess.image.crop             null                 default",
        "model.preprocess.image.interpolation    bilinear             default",
        "model.preprocess.image.scale            0.00392156862745098  default",
        "model.preprocess.image.mean             null                 default",
        "model.preprocess.image.std              null                 default",
        "model.preprocess.image.channels         rgb                  default",
        "model.preprocess.image.layout           chw                  default",
        "model.preprocess.volume.spacing         null                 default",
        "model.preprocess.volume.resample_to     null                 default",
        "model.preprocess.volume.window          null                 default",
        "model.preprocess.volume.pad_or_crop_to  null                 default",
        "model.dtype                             auto                 default",
        "model.load_format                       auto                 default",
        "model.max_model_len                     null                 default",
        "parallel.tensor_parallel_size           1                    default",
        "parallel.pipeline_parallel_size         1                    parallel.stages",
        'parallel.stages.0.modules               ["a.{0..1}", "b"]    plan.yaml:5:17',
        "parallel.stages.0.tensor_parallel_size  null                 default",
        "parallel.stages.0.devices               [3]                  plan.yaml:5:43",
        "parallel.split_points                   null                 default",
        "parallel.tp_plan                        null                 default",
        "parallel.device                         auto                 default",
        "compile.backend                         tensorrt             default",
        "compile.buckets                         null                 default",
        "compile.enforce_eager                   false                default",
        "compile.allow_tf32                      false                default",
        "compile.parity.max_error_ratio          4.0                  default",
        "compile.parity.min_cosine               0.999                default",
        "compile.parity.max_gain_error           0.02                 default",
        "compile.parity.min_top1                 0.99                 default",
        "compile.parity.max_kl                   0.02                 default",
        "compile.parity.num_tokens               128                  default",
        "scheduler.max_num_seqs                  4                    --max-num-seqs",
        "scheduler.max_num_batched_tokens        8192                 default",
        "scheduler.max_batch_size                8                    default",
        "scheduler.preferred_batch_size          null                 default",
        "scheduler.max_queue_delay_ms            5.0                  default",
        "scheduler.max_queue_size                256                  default",
        "kv_cache.gpu_memory_utilization         0.9                  default",
        "kv_cache.block_size                     32                   --set",
        "distributed.init_timeout_s              300.0                default",
        "distributed.build_timeout_s             7200.0               default",
        "distributed.collective_timeout_s        null                 default",
        "distributed.all_reduce                  auto                 default",
        "tiling                                  null                 default",
        'server.host                             "127.0.0.1"          default',
        "server.port                             8000                 default",
        "server.uds                              null                 default",
        "server.stall_timeout_s                  null                 default",
        "server.model_name                       null                 default",
        "server.api_key_file                     null                 default",
        "server.max_request_bytes                2097152              default",
        "server.request_timeout_s                null                 default",
        "server.shutdown_timeout_s               60.0                 default",
        "observability.nvtx                      false                default",
        "security.factories                      []                   default",
        "security.network_guard                  off                  default",
        "security.network_report                 null                 default",
        "security.bundle_key                     null                 default",
    ]


def test_a_tensor_model_is_shown_with_its_mappings_and_inputs() -> None:
    Path("w.bin").touch()
    loaded = load(plan(TENSOR_TEXT), overrides=['parallel.tp_plan={"a.*.up": colwise}'])
    lines = [" ".join(line.split()) for line in show(loaded).splitlines()]
    assert lines[5:10] == [
        "model.factory_args.depth 3 plan.yaml:6:25",
        "model.inputs.0.name image plan.yaml:5:19",
        "model.inputs.0.dtype float32 default",
        'model.inputs.0.shape ["batch", 3, "height"] plan.yaml:5:33',
        "model.dims.height [320, 640] plan.yaml:7:18",
    ]
    assert "parallel.tp_plan.a.*.up colwise --set" in lines
    assert "tiling.roi_size [64, 64] plan.yaml:8:20" in lines
    assert "tiling.sw_batch_size null default" in lines
    assert as_json(loaded)["config"]["model"]["dims"] == {"height": [320, 640]}


def test_text_that_yaml_would_take_for_something_else_is_quoted() -> None:
    for name in ("null", "12", "a b", "a: b"):
        Path(name).mkdir()
        loaded = load(None, flags={"model.path": Flag("MODEL", name)})
        assert f'"{name}"' in show(loaded).splitlines()[1]


def test_json_holds_a_config_that_validates_again() -> None:
    loaded = load(plan(TEXT))
    document = json.loads(json.dumps(as_json(loaded)))
    assert RunnerConfig.model_validate(document["config"]) == loaded.config
    assert document["origins"]["model.path"] == "plan.yaml:2:15"
