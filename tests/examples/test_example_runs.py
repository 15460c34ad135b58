"""The worked examples on ranks: every cut computes what plain torch or onnxruntime computes."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from example_models import (
    ROOT,
    Example,
    Floats,
    error_of,
    on_ranks,
    run_offline,
    torch_outputs,
)
from PIL import Image
from processes import run_command
from rank_pool import RankPool
from safetensors.torch import load_file

from examples.ct.ct_backbone import backbone
from examples.ct.join_weights import PACKAGES as CT_PACKAGES
from examples.ct.join_weights import write_weights as write_ct_weights
from examples.ct.make_volume import write_volume
from examples.efficientnet.convert_weights import PACKAGE as EFFICIENTNET_PACKAGE
from examples.efficientnet.convert_weights import write_weights as write_efficientnet_weights
from examples.efficientnet.efficientnet_lite0 import classifier
from examples.efficientnet.make_photos import PHOTOS, write_photos
from examples.lidar.make_scenes import FIRST_SEED
from examples.lidar.pointnet import PointNet, segmenter
from examples.lidar.scenes import Scene, make_scene
from examples.lidar.scores import score
from examples.lidar.train import WEIGHTS as LIDAR_WEIGHTS
from examples.ocr.boxes import Box
from examples.ocr.draw_text import DrawnLine, draw_page
from examples.ocr.ocr import Line, Model, line_input, load_characters, page_input, read_image
from examples.ocr.read_images import onnxruntime_model
from parallel.errors import ConfigError
from runner.graph_planning import GraphJob
from runner.items.listing import list_items
from runner.items.reading import read_item
from runner.items.spec import ArraySpec
from runner.pipeline.offline import preprocess_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

TOLERANCE = 1e-4
PIPELINES = (
    pytest.param([1, 1, 1, 1], marks=pytest.mark.full),
    [1, 1],
    pytest.param([1], marks=pytest.mark.full),
)
"""Every process traces the model anew, which takes most of the time."""
NUM_SCENES = 64
MIN_MEAN_IOU = 0.85  # 0.888 on the scenes of examples/lidar/README.md
TWO_A_BATCH = ("scheduler.max_batch_size=2", "scheduler.preferred_batch_size=null")


def _needs(names: Sequence[str], example: str) -> pytest.MarkDecorator:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    reason = f"{', '.join(absent)} not installed; see examples/{example}/README.md"
    return pytest.mark.skipif(bool(absent), reason=reason)


needs_ct = _needs(CT_PACKAGES, "ct")
needs_efficientnet = _needs([EFFICIENTNET_PACKAGE, "skimage"], "efficientnet")
needs_ocr = _needs(["rapidocr_onnxruntime", "onnx2torch", "onnxruntime"], "ocr")


# ---- LiDAR


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(FIRST_SEED + index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def pointnet() -> PointNet:
    model = segmenter()
    model.load_state_dict(load_file(LIDAR_WEIGHTS))
    return model


@pytest.mark.parametrize("tp_sizes", PIPELINES, ids=str)
def test_every_cut_of_the_pointnet_gives_its_logits(
    tp_sizes: list[int], rank_pool: RankPool, pointnet: PointNet, scenes: list[Scene]
) -> None:
    points = np.stack([scene.points for scene in scenes[:3]])
    cut = on_ranks(rank_pool, Example("lidar/plan.yaml", TWO_A_BATCH), tp_sizes)
    assert error_of(cut(points), torch_outputs(pointnet, points)) <= TOLERANCE


def test_a_stream_of_scenes_is_batched_and_classified(
    rank_pool: RankPool, pointnet: PointNet, scenes: list[Scene], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for index, scene in enumerate(scenes):
        np.save(tmp_path / "in" / f"{index:02}.npy", scene.points)
    example = Example("lidar/plan.yaml")
    metrics, _ = rank_pool.run(run_offline, [1, 1], example, tmp_path / "in", tmp_path / "out")
    assert metrics.completed == NUM_SCENES
    assert metrics.mean_batch_size > 1
    found = [np.load(tmp_path / "out" / f"{index:02}.npy") for index in range(NUM_SCENES)]
    expected = torch_outputs(pointnet, np.stack([scene.points for scene in scenes]))
    for ours, plain in zip(found, expected, strict=True):
        assert error_of(ours, plain) <= TOLERANCE
    answers = [(s.labels, logits.argmax(axis=0)) for s, logits in zip(scenes, found, strict=True)]
    assert score(answers).mean_iou > MIN_MEAN_IOU


def test_the_command_of_its_readme_labels_scenes(tmp_path: Path) -> None:
    make = [sys.executable, "-m", "examples.lidar.make_scenes", str(tmp_path), "--num-scenes", "5"]
    subprocess.run(make, check=True, cwd=ROOT)
    folders = [str(tmp_path / "points"), "--output", str(tmp_path / "out")]
    options = ["--config", "examples/lidar/plan.yaml", "--format", "npy", "--json"]
    ended = run_command("run", *folders, *options, timeout_s=200)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["finished"], told["failed"]) == (5, {})
    files = sorted((tmp_path / "labels").iterdir())
    pairs = [(np.load(f), np.load(tmp_path / "out" / f.name).argmax(axis=0)) for f in files]
    assert score(pairs).mean_iou > MIN_MEAN_IOU


# ---- EfficientNet


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_efficientnet_weights(tmp_path_factory.mktemp("efficientnet"))


@pytest.fixture(scope="module")
def photos(efficientnet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Floats]:
    """As the plan prepares them, by the names of their files."""
    example = Example("efficientnet/plan.yaml", (f"model.path={efficientnet}",))
    files = list(write_photos(tmp_path_factory.mktemp("photos")))
    return dict(zip([f.name for f in files], _prepared(files, example), strict=True))


@needs_efficientnet
@pytest.mark.parametrize(
    "tp_sizes",
    [*PIPELINES, *(pytest.param(sizes, marks=pytest.mark.full) for sizes in ([2], [1, 2]))],
    ids=str,
)
def test_every_cut_of_efficientnet_names_what_photographs_show(
    tp_sizes: list[int], rank_pool: RankPool, efficientnet: Path, photos: dict[str, Floats]
) -> None:
    settings = [*TWO_A_BATCH, "compile.buckets=[2]", f"model.path={efficientnet}"]
    if max(tp_sizes) > 1:
        settings.append('parallel.tp_plan={"_fc": colwise_gather_output}')
    cut = on_ranks(rank_pool, Example("efficientnet/plan.yaml", tuple(settings)), tp_sizes)
    images = np.stack(list(photos.values()))
    logits = cut(images)

    model = classifier()
    model.load_state_dict(load_file(efficientnet))
    assert error_of(logits, torch_outputs(model, images)) <= TOLERANCE
    answers = dict(zip(photos, logits.argmax(axis=1).tolist(), strict=True))
    assert {name: answer for name, answer in answers.items() if answer not in PHOTOS[name]} == {}


# ---- CT


SHORT_BACKBONE = (
    "model.load_format=dummy",
    "model.path=examples/ct",
    "model.factory_args={num_blocks: [1, 1, 2, 1]}",
    "model.inputs=[{name: volume, shape: [batch, 1, 32, 32, 16]}]",
    *TWO_A_BATCH,
)


@pytest.mark.parametrize("tp_sizes", PIPELINES, ids=str)
def test_every_cut_of_a_short_ct_backbone_gives_its_features(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    volumes = np.random.default_rng(0).random((3, 1, 32, 32, 16), dtype=np.float32)
    cut = on_ranks(rank_pool, Example("ct/plan.yaml", SHORT_BACKBONE), tp_sizes)
    torch.manual_seed(0)
    model = backbone(num_blocks=[1, 1, 2, 1])
    assert error_of(cut(volumes), torch_outputs(model, volumes)) <= TOLERANCE


def test_the_command_reads_volumes_and_writes_features(tmp_path: Path) -> None:
    files = [tmp_path / "volumes" / f"chest{seed}.nii.gz" for seed in range(3)]
    files[0].parent.mkdir()
    for seed, file in enumerate(files):
        write_volume(file, size=(40, 36, 20), seed=seed)
    settings = (*SHORT_BACKBONE, "model.preprocess.volume.resample_to=[32, 32, 16]")
    folders = [str(files[0].parent), "--output", str(tmp_path / "out"), "--format", "npy"]
    options = [option for setting in settings for option in ("--set", setting)]
    config = ["--config", "examples/ct/plan.yaml", "-pp", "2", "--device", "cpu"]
    ended = run_command("run", *folders, *config, *options, "--json", timeout_s=200)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["finished"], told["failed"]) == (3, {})
    assert 0 <= told["bubble_predicted"] < 1
    torch.manual_seed(0)
    volumes = _prepared(files, Example("ct/plan.yaml", settings))
    expected = torch_outputs(backbone(num_blocks=[1, 1, 2, 1]), volumes)
    features = np.stack([np.load(tmp_path / "out" / f"chest{seed}.npy") for seed in range(3)])
    assert error_of(features, expected) <= TOLERANCE


@needs_ct
@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("size", "tp_sizes"),
    [
        ((64, 64, 32), [1]),
        ((64, 64, 32), [1, 1]),
        ((64, 64, 32), [1, 1, 1, 1]),
        ((224, 224, 160), [1]),
        ((224, 224, 160), [1, 1]),
        ((224, 224, 160), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_every_cut_of_the_whole_ct_backbone_gives_its_features(
    size: tuple[int, int, int], tp_sizes: list[int], rank_pool: RankPool, tmp_path: Path
) -> None:
    weights = write_ct_weights(tmp_path)
    write_volume(tmp_path / "chest.nii.gz", size=(72, 72, 40), seed=0)
    settings = (
        f"model.path={weights}",
        f"model.inputs=[{{name: volume, shape: {['batch', 1, *size]}}}]",
        f"model.preprocess.volume.resample_to={list(size)}",
    )
    volume = _prepared([tmp_path / "chest.nii.gz"], Example("ct/plan.yaml", settings))
    cut = on_ranks(rank_pool, Example("ct/plan.yaml", settings), tp_sizes)
    model = backbone()
    model.load_state_dict(load_file(weights))
    assert error_of(cut(volume), torch_outputs(model, volume)) <= TOLERANCE


@pytest.mark.parametrize(
    ("example", "pattern"),
    [
        (Example("ct/plan.yaml", SHORT_BACKBONE), "conv1"),
        (Example("lidar/plan.yaml"), "from_point"),
    ],
    ids=["ct", "lidar"],
)
def test_a_convolution_in_a_tp_plan_is_refused(example: Example, pattern: str) -> None:
    settings = (*example.settings, f"parallel.tp_plan={{{pattern}: colwise}}")
    config = Example(example.plan, settings).config([2])
    with pytest.raises(ConfigError, match=f"{pattern}.*pipeline_parallel_size"):
        GraphJob.prepare(config)


# ---- OCR


@pytest.fixture(scope="module")
def ocr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ocr")
    subprocess.run([sys.executable, ROOT / "examples/ocr/fetch", folder], check=True)
    return folder


def _recognizer(ocr: Path, widths: list[int]) -> Example:
    model = f"model.path={ocr / 'recognize.onnx'}"
    return Example("ocr/recognize.yaml", (model, f"model.dims={{width: {widths}}}"))


@pytest.fixture(scope="module")
def detector(ocr: Path) -> Example:
    settings = (f"model.path={ocr / 'detect.onnx'}", "compile.buckets=[2]")
    return Example("ocr/plan.yaml", settings)


@needs_ocr
@pytest.mark.parametrize("tp_sizes", PIPELINES, ids=str)
def test_every_cut_of_the_detector_gives_its_map(
    tp_sizes: list[int], rank_pool: RankPool, detector: Example, ocr: Path
) -> None:
    pages = np.stack([page_input(draw_page(seed)[0]) for seed in range(3)])
    found = on_ranks(rank_pool, detector, tp_sizes)(pages)
    assert error_of(found, onnxruntime_model(ocr / "detect.onnx")(pages)) <= TOLERANCE


@needs_ocr
@pytest.mark.parametrize("tp_sizes", PIPELINES, ids=str)
def test_every_cut_of_the_recognizer_gives_its_characters(
    tp_sizes: list[int], rank_pool: RankPool, ocr: Path
) -> None:
    image, drawn = draw_page(1)
    boxes = [_box_of(line) for line in drawn]
    assert len(boxes) == 5, "one batch of 4, and one sample left over"
    lines = np.stack([line_input(image, box, [640]) for box in boxes])
    found = on_ranks(rank_pool, _recognizer(ocr, [640]), tp_sizes)(lines)
    assert error_of(found, onnxruntime_model(ocr / "recognize.onnx")(lines)) <= TOLERANCE


@needs_ocr
@pytest.mark.parametrize(
    ("seeds", "widths"),
    [((4, 5), [640]), ((0, 3), [320, 640])],
    ids=["one width", "two widths"],
)
@pytest.mark.full
def test_both_models_on_ranks_read_what_onnxruntime_reads(
    seeds: tuple[int, int], widths: list[int], rank_pool: RankPool, detector: Example, ocr: Path
) -> None:
    examples = (detector, _recognizer(ocr, widths))
    ours = [on_ranks(rank_pool, example, [1, 1]) for example in examples]
    plain = [onnxruntime_model(ocr / f"{name}.onnx") for name in ("detect", "recognize")]
    for seed in seeds:
        image, drawn = draw_page(seed)
        read, expected = (_read(image, models, ocr) for models in (ours, plain))
        assert [line.text for line in read] == [line.text for line in drawn]
        assert [line.text for line in read] == [line.text for line in expected]
        for a, b in zip(read, expected, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-4)
            np.testing.assert_allclose(a.box.corners(), b.box.corners(), atol=0.1)


def _read(image: Image.Image, models: Sequence[Model], ocr: Path) -> list[Line]:
    characters = load_characters(ocr / "characters.txt")
    detect, recognize = models
    return read_image(image, detect=detect, recognize=recognize, characters=characters)


def _box_of(line: DrawnLine) -> Box:
    """The box around a line as it was drawn, with a margin."""
    x, y = np.array(line.corners).T
    middle = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
    return Box(*middle, np.ptp(x) + 12, np.ptp(y) + 8, angle=0.0, score=1.0)


def _prepared(files: Sequence[Path], example: Example) -> Floats:
    """What the model sees of files, as `shardline run` reads them."""
    config = example.config()
    assert config.model.inputs is not None
    (given,) = config.model.inputs
    shape = tuple(size for size in given.shape if isinstance(size, int))
    spec, preprocess = ArraySpec(given.name, "float32", shape), preprocess_of(config)
    items = [item for file in files for item in list_items([file])]
    return np.stack([read_item(item, [spec], preprocess)[given.name] for item in items])
