"""Windows, weights and stitching against direct dense computations."""

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parallel.errors import ConfigError, InternalError
from runner.items.stitching import Stitcher
from runner.items.tiling import Tiling

RANDOM = np.random.default_rng(3)
OVERLAPS = (0.0, 0.1, 0.25, 0.5, 0.75)


def sample(*shape: int) -> NDArray[np.float32]:
    return RANDOM.uniform(-1, 1, shape).astype(np.float32)


def stitched(tiling: Tiling, values: NDArray[np.float32], model=lambda batch: batch):  # type: ignore[no-untyped-def]
    stitcher = Stitcher(values.shape[1:], tiling)
    for windows, batch in tiling.batches(values):
        stitcher.add(windows, model(batch))
    return stitcher.result()


def test_windows_start_an_interval_apart_and_end_at_the_border() -> None:
    windows = Tiling((4, 3), overlap=0.5).windows((9, 3))
    assert windows == [
        (slice(at, at + 4), slice(0, 3))
        for at in (0, 2, 4, 5)  # int(4 * 0.5) = 2 apart; 6 would go beyond 9.
    ]
    # int(3 * 0.25) = 0 becomes 1.
    assert len(Tiling((3,), overlap=0.75).windows((6,))) == 4
    # The last dimension varies fastest.
    corners = [(a.start, b.start) for a, b in Tiling((2, 2), overlap=0).windows((4, 3))]
    assert corners == [(0, 0), (0, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_windows_cover_everything_and_none_comes_twice(overlap: float) -> None:
    for size, roi in product(range(1, 20), range(1, 9)):
        tiling = Tiling((roi,), overlap=overlap)
        (padded,) = tiling.padded_shape((size,))
        starts = [window[0].start for window in tiling.windows((size,))]
        covered = {at + i for at in starts for i in range(roi)}
        assert covered == set(range(padded))
        assert sorted(set(starts)) == starts


def test_a_small_sample_is_padded_on_both_sides() -> None:
    tiling = Tiling((6, 4), padding_mode="constant", cval=7)
    assert tiling.padding((3, 9)) == [(1, 2), (0, 0)]
    assert tiling.padded_shape((3, 9)) == (6, 9)
    (_, batch), *_ = tiling.batches(np.zeros((2, 3, 9), dtype=np.float32))
    assert batch[0, :, :, 0].tolist() == [[7, 0, 0, 0, 7, 7]] * 2


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_is_torchs(mode: str) -> None:
    values = sample(2, 5, 6)
    ((_, batch),) = Tiling((8, 9), padding_mode=mode).batches(values)  # type: ignore[arg-type]
    expected = torch.nn.functional.pad(torch.from_numpy(values)[None], (1, 2, 1, 2), mode=mode)
    np.testing.assert_array_equal(batch, expected.numpy())


def test_the_gaussian_weights() -> None:
    weights = Tiling((8, 5), mode="gaussian", sigma_scale=0.25).importance()
    assert weights.dtype == np.float32
    assert weights.shape == (8, 5)
    for i, j in product(range(8), range(5)):
        exponent = ((i - 3.5) / (8 * 0.25)) ** 2 / 2 + ((j - 2) / (5 * 0.25)) ** 2 / 2
        assert weights[i, j] == pytest.approx(np.exp(-exponent), rel=1e-5)


def test_no_gaussian_weight_is_below_a_thousandth() -> None:
    weights = Tiling((33, 33), mode="gaussian").importance()
    assert weights[0, 0] == pytest.approx(1e-3)
    assert weights[16, 16] == 1
    # exp(-(16 / (33 / 8))^2 / 2), in the middle of an edge, is above 5e-4 and below 1e-3.
    assert weights[0, 16] == pytest.approx(1e-3)
    assert (Tiling((4, 4)).importance() == 1).all()


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(
    ("shape", "roi"),
    [
        ((3, 37, 23), (8, 7)),
        ((1, 5, 41), (9, 16)),
        ((2, 11, 9, 13), (4, 9, 5)),
        ((1, 3, 3), (4, 5)),
    ],
)
def test_stitching_the_identity_gives_the_input(
    shape: tuple[int, ...], roi: tuple[int, ...], overlap: float, mode: str
) -> None:
    tiling = Tiling(roi, overlap=overlap, mode=mode, sw_batch_size=5)  # type: ignore[arg-type]
    values = sample(*shape)
    result = stitched(tiling, values)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, values, rtol=0, atol=1e-6)


def test_the_average_is_weighted() -> None:
    tiling = Tiling((4,), overlap=0.5, mode="gaussian")
    weights = tiling.importance()
    stitcher = Stitcher((6,), tiling)
    for value, window in zip((1.0, 2.0), tiling.windows((6,)), strict=True):
        stitcher.add([window], np.full((1, 1, 4), value, dtype=np.float16))
    middle = (weights[2:] + 2 * weights[:2]) / (weights[2:] + weights[:2])
    np.testing.assert_allclose(stitcher.result(), [[1, 1, *middle, 2, 2]], rtol=1e-6)


def test_a_convolution_is_dense_where_every_window_holds_all_it_sees() -> None:
    convolution = torch.nn.Conv2d(2, 4, 3, padding=1)
    values = sample(2, 25, 31)

    def model(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(convolution(torch.from_numpy(batch)))

    tiling = Tiling((12, 12), overlap=0.25, sw_batch_size=4)
    dense, result = model(values[None])[0], stitched(tiling, values, model)
    sees_all = np.ones((25, 31), dtype=bool)
    for window in tiling.windows((25, 31)):
        # At its edges a window sees zeros, as the whole does at the border of the sample alone.
        near_edge = np.ones((12, 12), dtype=bool)
        keep = [
            slice(s.start > 0, None if s.stop == size else -1)
            for s, size in zip(window, (25, 31), strict=True)
        ]
        near_edge[tuple(keep)] = False
        sees_all[window] &= ~near_edge
    assert 0.5 < sees_all.mean() < 1
    np.testing.assert_allclose(result[:, sees_all], dense[:, sees_all], atol=1e-5)
    assert np.abs(result - dense)[:, ~sees_all].max() > 1e-2


def test_outputs_that_cannot_be_stitched() -> None:
    tiling = Tiling((4, 4))
    windows = tiling.windows((4, 4))
    stitcher = Stitcher((4, 4), tiling)
    with pytest.raises(ConfigError, match=r"shape \(1, 2, 2, 4\) cannot be stitched: .* 4, 4\)"):
        stitcher.add(windows, np.zeros((1, 2, 2, 4), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"shape \(1, 10\) cannot be stitched"):
        stitcher.add(windows, np.zeros((1, 10), dtype=np.float32))
    with pytest.raises(ConfigError, match="an output of int64 cannot be averaged"):
        stitcher.add(windows, np.zeros((1, 2, 4, 4), dtype=np.int64))


def test_a_result_before_all_windows_is_a_defect() -> None:
    tiling = Tiling((4,), overlap=0)
    stitcher = Stitcher((8,), tiling)
    with pytest.raises(InternalError):
        stitcher.result()
    stitcher.add(tiling.windows((8,))[:1], np.zeros((1, 1, 4), dtype=np.float32))
    with pytest.raises(InternalError):
        stitcher.result()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roi_size": (4, 0)}, r"tiling\.roi_size=\(4, 0\) must be positive sizes"),
        ({"roi_size": ()}, r"tiling\.roi_size"),
        ({"overlap": 1}, r"tiling\.overlap=1 must be at least 0 and less than 1"),
        ({"overlap": -0.1}, r"tiling\.overlap"),
        ({"sw_batch_size": 0}, r"tiling\.sw_batch_size"),
        ({"mode": "mean"}, r"tiling\.mode='mean' must be constant or gaussian"),
        ({"sigma_scale": 0}, r"tiling\.sigma_scale"),
        ({"padding_mode": "edge"}, r"tiling\.padding_mode='edge' must be one of constant, reflect"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tiling(**{"roi_size": (4, 4), **settings})  # type: ignore[arg-type]


def test_another_number_of_dimensions() -> None:
    with pytest.raises(ConfigError, match="has 2 dimensions, the input has 3 besides its channels"):
        Tiling((4, 4)).windows((4, 4, 4))
