"""A plan of styles names each layer once, and none that is not split."""

import pytest
import torch
from apply_jobs import MLP_PLAN, Mlp, groups
from torch import nn

from parallel.apply import apply
from parallel.errors import ConfigError


class Wrapped(nn.Module):
    """Layers of every kind that is not split, and some that are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(3, 4)
        self.cell = nn.GRUCell(3, 4)
        self.norm = nn.LayerNorm(4)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, 5)
        self.words = nn.Embedding(5, 4)
        self.renormed = nn.Embedding(5, 4, max_norm=1.0)
        self.attention = nn.MultiheadAttention(4, 2)
        self.biased = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.zeroed = nn.MultiheadAttention(4, 2, add_zero_attn=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.hooked = nn.Linear(4, 5)
        self.hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
        self.own = Scaled(4, 5)
        self.graph = torch.fx.symbolic_trace(Mlp(4, 5))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.alias = self.fc


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"conv": "colwise"},
            "parallel.tp_plan: 'conv' matches conv, a Conv2d; convolutions are not split; cut "
            "the model into pipeline stages instead: parallel.pipeline_parallel_size",
        ),
        ({"lstm": "rowwise"}, "lstm, a LSTM; recurrent layers are not split"),
        ({"cell": "rowwise"}, "cell, a GRUCell; recurrent layers are not split"),
        ({"norm": "colwise"}, "norm, a LayerNorm; normalization is not split; leave it out"),
        ({"bn": "heads"}, "bn, a BatchNorm2d; normalization is not split"),
        ({"act": "colwise"}, "act, a ReLU; colwise takes an nn.Linear, leave it out"),
        (
            {"words": "colwise"},
            "colwise takes an nn.Linear, use one of embedding_rowwise, embedding_colwise",
        ),
        ({"attention": "rowwise"}, "rowwise takes an nn.Linear, use one of heads"),
        ({"fc": "heads"}, "heads takes an nn.MultiheadAttention, use one of colwise,"),
        ({"fc": "column"}, "'fc' has the style 'column'; use one of colwise, "),
        ({"renormed": "embedding_rowwise"}, "renormed has max_norm"),
        ({"renormed": "embedding_colwise"}, "renormed has max_norm"),
        ({"biased": "heads"}, "biased has add_bias_kv=True"),
        ({"zeroed": "heads"}, "zeroed has add_zero_attn=True"),
        ({"attention.out_proj": "rowwise"}, "attention reads by itself; give attention the"),
        ({"normed": "colwise"}, "with a forward, hooks or a parametrization of its own"),
        ({"hooked": "colwise"}, "with a forward, hooks or a parametrization of its own"),
        ({"own": "colwise"}, "own, a Scaled with a forward, hooks or"),
        ({"graph": "colwise"}, "exported graphs and ONNX models are not split"),
        ({"graph.up": "colwise"}, "exported graphs and ONNX models are not split"),
        ({"fcc": "colwise"}, "'fcc' matches no module of the model; the nearest is fc"),
        ({"layers.3": "colwise"}, "'layers.3' matches no module"),
        ({"layers.{1..3}": "colwise"}, "goes beyond layers.2, the last module of that name"),
        (
            {"fc": "colwise", "fc*": "colwise"},
            "'fc*' matches no module of the model; the nearest is fc",
        ),
        (
            {"layers.0": "colwise", "layers.*": "colwise"},
            "'layers.*' matches layers.0, which 'layers.0' matches too; list it once",
        ),
        (
            {"fc": "colwise", "alias": "replicate"},
            "'alias' matches alias, which 'fc' matches too as fc; list it once",
        ),
        (
            {"layers": "replicate", "layers.1": "colwise"},
            "layers.1, which lies in layers, and that is matched by 'layers'; keep one",
        ),
        ({"": "colwise"}, "'' matches the model, a Wrapped; colwise takes an nn.Linear"),
    ],
    ids=str,
)
def test_a_plan(plan: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply(Wrapped(), plan, groups(2)[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exported_program() -> None:
    program = torch.export.export(Mlp(4, 5), (torch.randn(2, 4),)).module()
    with pytest.raises(ConfigError, match="exported graphs and ONNX models are not split"):
        apply(program, MLP_PLAN, groups(2)[0])


def test_a_star_is_not_the_model_itself() -> None:
    applied = apply(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), {"*": "colwise"}, groups(2)[0])
    assert applied.atomic == {"0", "1"}
