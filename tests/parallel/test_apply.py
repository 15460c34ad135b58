"""Any module divided by rules computes what the module computes, and its ranks hold it exactly."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import apply_jobs
import pytest
import torch
from apply_jobs import (
    ENCODER_PLAN,
    MLP_PLAN,
    REPEATED_PLAN,
    TEXT_PLAN,
    VISION_PLAN,
    Mlp,
    Repeated,
    Text,
    Vision,
    assert_divides,
    call,
    groups,
)
from rank_pool import RankPool
from torch import nn

from parallel.apply import Applied, apply
from parallel.collectives import SYMBOLIC, Group, all_gather, all_reduce
from parallel.errors import ConfigError
from parallel.plan import LocalTensor

# The last one has two groups side by side: a collective over the whole world would show.
TOPOLOGIES = pytest.mark.parametrize("tp_sizes", [[2], [3], [2, 3]], ids=str)

Model = Callable[[], tuple[nn.Module, dict[str, str]]]

MODELS: dict[str, Model] = {
    "mlp": lambda: (Mlp(11, 13), MLP_PLAN),
    "gathered": lambda: (Mlp(11, 13), {"up": "colwise_rep", "down": "rowwise_rep"}),
    "repeated": lambda: (Repeated(), REPEATED_PLAN),
    "text": lambda: (Text(6), TEXT_PLAN),
    "tied otherwise": lambda: (Text(6), TEXT_PLAN | {"head": "rowwise_split_input"}),
    "vision": lambda: (Vision(), VISION_PLAN),
    "batch norm": lambda: (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7)), {"1": "colwise"}),
    "kdim": lambda: (nn.MultiheadAttention(10, 5, kdim=3, vdim=4), {"": "heads"}),
    "encoder": lambda: (apply_jobs.encoder(4), ENCODER_PLAN),
    "nothing": lambda: (Mlp(3, 4), {}),
}

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.dist
@TOPOLOGIES
def test_a_module_called_again_and_under_two_names(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    x = torch.randn(3, 6)
    assert_divides(rank_pool, tp_sizes, call(Repeated(), REPEATED_PLAN, x))


@pytest.mark.dist
@TOPOLOGIES
def test_a_vision_transformer(tp_sizes: list[int], rank_pool: RankPool) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert_divides(rank_pool, tp_sizes, call(Vision(), VISION_PLAN, images))


@pytest.mark.dist
@pytest.mark.parametrize("head", ["colwise_gather_output", "rowwise_split_input", "replicate"])
@pytest.mark.parametrize("tp_size", [2, 3])
def test_a_text_encoder_whose_head_is_tied(tp_size: int, head: str, rank_pool: RankPool) -> None:
    """Embedding and head hold the same rows, or each what its own style says."""
    ids = torch.randint(0, 13, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    plan = TEXT_PLAN | {"head": head}
    assert_divides(rank_pool, [tp_size], call(Text(6), plan, ids, mask))


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each under all of its names."""
    found: dict[str, torch.Tensor] = {}
    found |= dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def assembled(tensor: LocalTensor, originals: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A local tensor made of its pieces, as a loader does it."""
    blocks = []
    for piece in tensor.pieces:
        whole, (start, stop) = originals[piece.source].detach(), piece.range
        blocks.append(whole if piece.dim is None else whole.narrow(piece.dim, start, stop - start))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, tensor.dim)


@EVERY_MODEL
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_tensor_is_made_of_its_pieces(name: str, size: int) -> None:
    module, plan = MODELS[name]()
    originals = tensors_of(module)
    for group in groups(size):
        applied = apply(module, plan, group)
        held = tensors_of(applied.module)
        assert list(applied.tensors) == list(held) == list(originals)
        for tensor_name, tensor in applied.tensors.items():
            assert tensor.name == tensor_name
            assert tensor.shape == held[tensor_name].shape
            assert torch.equal(assembled(tensor, originals), held[tensor_name])


@EVERY_MODEL
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_tile_exactly(name: str, size: int) -> None:
    """Each element of a split tensor is on one rank, of a replicated one on every rank."""
    module, plan = MODELS[name]()
    originals = tensors_of(module)
    ranks = [apply(module, plan, group) for group in groups(size)]
    for tensor_name, original in originals.items():
        counts = torch.zeros(original.shape)
        for applied in ranks:
            for piece in applied.tensors[tensor_name].pieces:
                assert originals[piece.source] is original
                start, stop = piece.range
                if piece.dim is None:
                    counts += 1 / size
                else:
                    counts.narrow(piece.dim, start, stop - start).add_(1)
        torch.testing.assert_close(counts, torch.ones_like(counts))


def test_what_is_split_and_by_how_much() -> None:
    """Thirteen features over three ranks are 5, 4 and 4; a row-parallel bias is whole."""
    shapes = [
        {name: tensor.shape for name, tensor in apply(Mlp(11, 13), MLP_PLAN, g).tensors.items()}
        for g in groups(3)
    ]
    assert shapes == [
        {"up.weight": (n, 11), "up.bias": (n,), "down.weight": (11, n), "down.bias": (11,)}
        for n in (5, 4, 4)
    ]


def test_heads_are_dealt_out_whole() -> None:
    """Nine heads of two features over two ranks are five and four."""
    attention = nn.MultiheadAttention(18, 9)
    first, second = (apply(attention, {"": "heads"}, g).tensors for g in groups(2))
    held = [[piece.range for piece in t["in_proj_weight"].pieces] for t in (first, second)]
    assert held == [[(0, 10), (18, 28), (36, 46)], [(10, 18), (28, 36), (46, 54)]]
    assert first["out_proj.weight"].pieces[0].range == (0, 10)
    assert second["out_proj.weight"].pieces[0].range == (10, 18)
    assert first["out_proj.bias"].pieces[0].dim is None


@EVERY_MODEL
def test_the_original_stays_as_it_is(name: str) -> None:
    module, plan = MODELS[name]()
    module.train()
    before, values = tensors_of(module), copy.deepcopy(module.state_dict())
    modules = list(module.modules())
    applied = apply(module, plan, groups(2)[1])
    after = tensors_of(module)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in values.items())
    assert list(module.modules()) == modules
    assert all(part.training for part in modules)
    assert not any(part.training for part in applied.module.modules())
    assert not set(modules) & set(applied.module.modules())


@EVERY_MODEL
def test_nothing_is_copied_but_merged_projections(name: str) -> None:
    module, plan = MODELS[name]()
    storages = {t.untyped_storage().data_ptr() for t in tensors_of(module).values()}
    for tensor_name, tensor in tensors_of(apply(module, plan, groups(2)[1]).module).items():
        shared = tensor.untyped_storage().data_ptr() in storages
        assert shared or "in_proj" in tensor_name


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = Text(6)
    for tensor in tensors_of(apply(module, TEXT_PLAN, groups(3)[2]).module).values():
        assert tensor.is_meta


def test_a_tied_parameter_stays_one_where_its_shares_are_equal() -> None:
    alike = apply(Text(6), TEXT_PLAN, groups(2)[1])
    assert alike.module.get_parameter("head.weight") is alike.module.get_parameter("words.weight")
    assert alike.tensors["head.weight"].pieces == alike.tensors["words.weight"].pieces
    other = apply(Text(6), TEXT_PLAN | {"head": "replicate"}, groups(2)[1])
    assert other.tensors["head.weight"].shape == (13, 12)
    assert other.tensors["words.weight"].shape == (6, 12)


def test_swapped_layers_are_named() -> None:
    model = apply(apply_jobs.encoder(4), ENCODER_PLAN, groups(2)[0])
    parts = ("self_attn", "linear1", "linear2")
    assert model.atomic == {f"layers.{i}.{part}" for i in (0, 1) for part in parts}
    repeated = apply(Repeated(), REPEATED_PLAN, groups(2)[0])
    assert repeated.atomic == {"first.up", "first.down", "second.up", "second.down"}
    assert apply(nn.Linear(3, 4), {"": "colwise"}, groups(2)[0]).atomic == {""}


def traced(applied: Applied, *args: torch.Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    """The collectives of a twin's exported graph with their arguments but the tensor."""
    graph = torch.export.export(applied.module, args).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node in calls:
        target = str(node.target)
        if target.startswith("_c10d_functional.") and "wait_tensor" not in target:
            (user,) = node.users
            assert str(user.target) == "_c10d_functional.wait_tensor.default"
    return [
        (str(node.target), tuple(node.args[1:]))
        for node in calls
        if str(node.target).startswith("_c10d_functional.")
    ]


REDUCE = ("_c10d_functional.all_reduce.default", ("sum", SYMBOLIC))
WAIT = ("_c10d_functional.wait_tensor.default", ())


def gather(size: int) -> tuple[str, tuple[Any, ...]]:
    return ("_c10d_functional.all_gather_into_tensor.default", (size, SYMBOLIC))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_same_collectives_in_order(size: int) -> None:
    ids, mask = torch.randint(0, 13, (3, 6)), torch.ones(3, 6, dtype=torch.bool)
    order = [REDUCE, gather(size), *[REDUCE] * 4, gather(size)]
    for group in groups(size):
        found = traced(apply(Text(6), TEXT_PLAN, group), ids, mask)
        assert found == [step for collective in order for step in (collective, WAIT)]


@pytest.mark.parametrize("size", [2, 3])
def test_an_encoder_on_every_rank(size: int) -> None:
    """Weights that need no gradient would let torch trace its fast path."""
    model, x = apply_jobs.encoder(4).requires_grad_(False), torch.randn(3, 5, 8)
    for group in groups(size):
        assert traced(apply(model, ENCODER_PLAN, group), x) == [REDUCE, WAIT] * 4


def test_a_vision_transformer_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, images = Vision(), torch.randn(2, 3, 8, 8)
    for group in groups(3):
        found = traced(apply(model, VISION_PLAN, group), images)
        assert found == [REDUCE, WAIT] * 4 + [gather(3), WAIT]


def test_a_group_of_one_has_none() -> None:
    x = torch.randn(2, 3, 8, 8)
    module = Vision().eval()
    applied = apply(module, VISION_PLAN, Group.alone())
    assert traced(applied, x) == []
    torch.testing.assert_close(applied.module(x), module(x))


@pytest.mark.parametrize("collective", [all_reduce, all_gather])
def test_a_symbolic_group_cannot_be_run(
    collective: Callable[[torch.Tensor, Group], torch.Tensor],
) -> None:
    with pytest.raises(RuntimeError, match=f"under the name {SYMBOLIC}"):
        collective(torch.ones(2, 3), groups(2)[0])


def test_a_model_that_cannot_be_copied() -> None:
    model = Mlp(4, 5)
    model.rows = (row for row in range(3))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"\(Mlp\) cannot be copied, .* 'generator' object"):
        apply(model, MLP_PLAN, groups(2)[0])
