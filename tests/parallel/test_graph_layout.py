"""Carries with their channels last: which they are, and that stages compute the same."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from graph_jobs import CASES, Case, make_job
from graph_models import ResNet, UNet, run_ranks, run_stages, trace
from torch import nn

from parallel.graph import Stage
from parallel.graph_layout import with_channels_last
from parallel.graph_modules import cut_at
from runner.pipeline.programs import programs_of, programs_to_compile
from runner.pipeline.stored_programs import read_programs, write_programs

_c10d = torch.ops._c10d_functional


class Volumes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 6, 3, padding=1), nn.ReLU())


class Summed(nn.Module):
    """One rank's share of a convolution's input channels, summed up between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 1)
        self.third = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = _c10d.wait_tensor(_c10d.all_reduce(x, "sum", "no such group"))
        return self.third(torch.relu(self.second(x)))


class TwoResults(nn.Module):
    """The feature map between its convolutions is a result, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        return x, self.second(x)


def sends(stages: Sequence[Stage]) -> list[list[tuple[int, ...]]]:
    return [[value.shape for value in stage.sends] for stage in stages]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(UNet(), (2, 2, 16, 16)), (ResNet(), (2, 3, 8, 8)), (Volumes(), (2, 1, 5, 6, 7))],
    ids=["unet", "resnet", "volumes"],
)
def test_stages_compute_the_same_at_every_cut(module: nn.Module, shape: tuple[int, ...]) -> None:
    module, x = module.double().eval(), torch.randn(shape, dtype=torch.float64)
    graph = trace(module, x)
    num_turned = 0
    for last in range(1, len(graph.units)):
        for boundaries in ([last], [1, last])[: 1 + (last > 1)]:
            stages = graph.stages(boundaries)
            turned = with_channels_last(stages)
            num_turned += turned != stages
            assert [s.weights.keys() for s in turned] == [s.weights.keys() for s in stages]
            found, wanted = (run_stages(graph, cut, x) for cut in (turned, stages))
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert num_turned > 0


def test_feature_maps_between_convolutions_are_turned() -> None:
    graph = trace(UNet().eval(), torch.randn(2, 2, 16, 16))
    stages = with_channels_last(graph.stages(cut_at(graph, ["down.2", "up.1"])))
    assert sends(stages)[:2] == [
        [(2, 16, 16, 4), (2, 8, 8, 8), (2, 4, 4, 8)],
        [(2, 16, 16, 4), (2, 8, 8, 16)],
    ]
    assert [value.shape for value in stages[2].receives] == sends(stages)[1]


def test_volumes_are_turned() -> None:
    graph = trace(Volumes().eval(), torch.randn(2, 1, 5, 6, 7))
    assert sends(with_channels_last(graph.stages([2])))[0] == [(2, 3, 4, 5, 4)]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (2, 3, 5, 4)),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1)), (2, 3, 6)),
        (TwoResults(), (2, 2, 8, 8)),
        (nn.Sequential(nn.Flatten(0, 1), nn.Conv2d(2, 2, 1), nn.Flatten()), (3, 2, 2, 4, 4)),
    ],
    ids=["no convolution", "sequences", "results", "convolved on one side"],
)
def test_other_carries_stay_as_they_are(module: nn.Module, shape: tuple[int, ...]) -> None:
    graph = trace(module.eval(), torch.randn(shape))
    for boundary in range(1, len(graph.units)):
        stages = graph.stages([boundary])
        assert with_channels_last(stages) == stages


def test_what_is_summed_up_stays_and_what_comes_later_does_not() -> None:
    module, given = Summed().double().eval(), torch.randn(2, 2, 2, 5, 5, dtype=torch.float64)
    graph = trace(module, given[0])
    for points, channels in ((["second"], (2, 4, 3, 3)), (["third"], (2, 3, 3, 6))):
        stages = graph.stages(cut_at(graph, points))
        turned = with_channels_last(stages)
        assert sends(turned)[0] == [channels]
        found, wanted = (run_ranks(graph, [cut] * 2, given[0]) for cut in (turned, stages))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "backend", "is_turned"),
    [
        ("cuda", "tensorrt", True),
        ("cuda", "auto", True),
        ("cuda", "inductor", False),
        ("cpu", "tensorrt", False),
    ],
)
def test_engines_are_given_them_and_nothing_else_is(
    device: str, backend: str, is_turned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = make_job(CASES["unet"], [1, 1], compile={"backend": backend, "buckets": [4]})
    monkeypatch.setattr(type(job), "device_type", device)
    programs = programs_to_compile(job, device="cpu")
    shapes = [value.shape for value in programs[0][0].sends]
    as_run = [value.shape for value in programs_of(job, 0, device="cpu")[0].sends]
    # The last of them is made larger before it is convolved.
    last = [(n, *size, channels) for n, channels, *size in as_run[:-1]] + as_run[-1:]
    assert shapes == (last if is_turned else as_run)
    write_programs(programs, tmp_path)
    assert read_programs(tmp_path, 1, device="cpu")[0].receives == programs[0][0].sends


def test_ranks_of_which_some_split_layers_keep_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one of them sums up and the next receives is no sum to a stage of one rank."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
            self.tail = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).permute(0, 2, 3, 1)
            return self.tail(self.down(torch.relu(self.up(x))))

    image = {"name": "image", "shape": ["batch", 3, 4, 8], "dtype": "float32"}
    plan, points = {"up": "colwise", "down": "rowwise"}, {2: ["tail"]}
    case = Case(Mixed, [image], tp_plan=plan, split_points=points)
    for sizes in ([1, 2], [2, 1], [2, 2]):
        job = make_job(case, sizes, compile={"backend": "tensorrt", "buckets": [4]})
        monkeypatch.setattr(type(job), "device_type", "cuda")
        programs = programs_to_compile(job, device="cpu")
        sent = [p[0].sends for p in programs[: sizes[0]]]
        received = [p[0].receives for p in programs[sizes[0] :]]
        assert {values[0].shape for values in (*sent, *received)} == {(4, 4, 8, 8)}
