"""What all ranks read, put together again, is the checkpoint: through real files and real plans.

The models are random in size and naming; no two elements of one model are equal, so a block that
is dropped, doubled or laid in the wrong place cannot go unnoticed.
"""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parallel_jobs
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from safetensors.torch import save_file

from parallel.checkpoint import INDEX_FILE, SINGLE_FILE
from parallel.decoder_plan import DecoderPlan, DecoderRankPlan
from parallel.errors import IntegrityError
from parallel.planner import Limits, make_plan
from parallel.slicing import Range
from parallel.topology import Topology
from parallel.weights import stream
from runner.models.spec import ModelSpec

Tensors = dict[str, torch.Tensor]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Naming:
    """How a family stores a model.

    Attributes:
        modules: modules of a layer and the parts that are stacked in each.
        biased: parts that have a bias.
        transposed: matrices of layers are stored (in, out).
    """

    architecture: str
    modules: dict[str, str]
    biased: str = ""
    prefix: str = "model."
    outer: tuple[str, ...] = ("embed_tokens", "norm")
    layers: str = "layers"
    transposed: bool = False


LLAMA = Naming(
    "LlamaForCausalLM",
    {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    },
)
LLAMA_BIAS = replace(LLAMA, biased="q k v o gate up down")
QWEN2 = replace(LLAMA, architecture="Qwen2ForCausalLM", biased="q k v")
PHI3 = Naming(
    "Phi3ForCausalLM",
    {
        "input_layernorm": "attention_norm",
        "self_attn.qkv_proj": "q k v",
        "self_attn.o_proj": "o",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_up_proj": "gate up",
        "mlp.down_proj": "down",
    },
)
GPT2 = Naming(
    "GPT2LMHeadModel",
    {
        "ln_1": "attention_norm",
        "attn.c_attn": "q k v",
        "attn.c_proj": "o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    biased="attention_norm q k v o mlp_norm up down norm",
    prefix="transformer.",
    outer=("wte", "ln_f", "wpe"),
    layers="h",
    transposed=True,
)


@dataclass(frozen=True)
class Model:
    """A model of these sizes, in its own naming on disk and as `parts` for the test.

    A part is what a textbook names: layers.0.q.weight, (out, in) for a matrix, neither fused nor
    transposed.
    """

    naming: Naming
    num_layers: int
    hidden: int
    mlp: int
    vocab: int
    kv_heads: int
    group: int
    head_dim: int
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json, in the keys of Llama and in those of GPT-2."""
        heads = self.group * self.kv_heads
        return {
            "architectures": [self.naming.architecture],
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 8,
            "attention_bias": self.naming is LLAMA_BIAS,
            "mlp_bias": self.naming is LLAMA_BIAS,
            "n_embd": self.hidden,
            "n_inner": self.mlp,
            "n_layer": self.num_layers,
            "n_head": heads,
            "n_positions": 8,
            "activation_function": "gelu_new",
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every part."""
        kv = self.kv_heads * self.head_dim
        query = kv * self.group
        matrices = {
            "q": (query, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, query),
            "gate": (self.mlp, self.hidden),
            "up": (self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }
        of_layer = " ".join(self.naming.modules.values()).split()
        weights: dict[str, tuple[int, ...]] = {
            f"layers.{i}.{part}": matrices.get(part, (self.hidden,))
            for i in range(self.num_layers)
            for part in of_layer
        }
        weights |= {"embed": (self.vocab, self.hidden), "norm": (self.hidden,)}
        weights |= {} if self.tied else {"head": (self.vocab, self.hidden)}
        weights |= {"positions": (8, self.hidden)} if "wpe" in self.naming.outer else {}
        biased = self.naming.biased.split()
        shapes = {f"{part}.weight": shape for part, shape in weights.items()}
        return shapes | {
            f"{part}.bias": shape[:1]
            for part, shape in weights.items()
            if part.rpartition(".")[2] in biased
        }

    def parts(self) -> Tensors:
        """Every element is the number of its place in the model; none is zero."""
        parts, first = {}, 1
        for part, shape in self.shapes().items():
            last = first + math.prod(shape)
            parts[part] = torch.arange(first, last, dtype=torch.float32).view(shape)
            first = last
        return parts

    def stored(self) -> Tensors:
        """The tensors as the checkpoint names, stacks and turns them."""
        naming, parts = self.naming, self.parts()
        stored: Tensors = {}

        def store(module: str, stack: list[str], *, transposed: bool = False) -> None:
            for kind in ("weight", "bias"):
                blocks = [parts[f"{part}.{kind}"] for part in stack if f"{part}.{kind}" in parts]
                if blocks:
                    whole = torch.cat(blocks)
                    turned = transposed and whole.dim() == 2
                    stored[f"{module}.{kind}"] = whole.t().contiguous() if turned else whole

        for part, name in zip(("embed", "norm", "positions"), naming.outer, strict=False):
            store(naming.prefix + name, [part])
        store("lm_head", ["head"])
        for i in range(self.num_layers):
            layer = f"{naming.prefix}{naming.layers}.{i}"
            for module, stack in naming.modules.items():
                names = [f"layers.{i}.{part}" for part in stack.split()]
                store(f"{layer}.{module}", names, transposed=naming.transposed)
        return stored

    def write(
        self, folder: Path, *, num_files: int = 1, is_base: bool = False, dtype: str = "float32"
    ) -> Path:
        """Write config.json and the weights.

        Args:
            num_files: 1 is a single file without an index.
            is_base: names as the base model has them, without the prefix.
        """
        (folder / "config.json").write_text(json.dumps(self.config))
        tensors = {
            name.removeprefix(self.naming.prefix if is_base else ""): x.to(getattr(torch, dtype))
            for name, x in self.stored().items()
        }
        if num_files == 1:
            save_file(tensors, folder / SINGLE_FILE)
            return folder
        files = {name: f"{i % num_files}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
        return folder


def divide(
    folder: Path, tp_sizes: list[int], *, dtype: str = "float32"
) -> tuple[ModelSpec, DecoderPlan]:
    spec = ModelSpec.open(folder)
    plan = make_plan(
        spec.layout,
        spec.checkpoint,
        Topology.of(tp_sizes),
        architecture=spec.config.architecture,
        dtype=dtype,
        limits=Limits(max_model_len=8, max_num_seqs=2, max_num_batched_tokens=8),
    )
    return spec, plan


def read(spec: ModelSpec, plan: DecoderPlan, rank: int) -> Tensors:
    """What a rank loads."""
    dtype = getattr(torch, plan.dtype)
    return dict(stream(spec.checkpoint, plan.ranks[rank], dtype=dtype, device=torch.device("cpu")))


@dataclass
class Block:
    """A piece of a part that a rank holds; whole where `dim` is None."""

    part: str
    values: torch.Tensor
    dim: int | None = None
    range: Range = (0, 0)

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """Its place in the whole part, as a view."""
        if self.dim is None:
            return whole
        start, stop = self.range
        return whole.narrow(self.dim, start, stop - start)


# The parts of parameters that a rank may hold whole; other names are the same.
PART_OF = {
    "embed_positions": "positions",
    "attention.norm": "attention_norm",
    "attention_residual": "o",
    "mlp.norm": "mlp_norm",
    "mlp_residual": "down",
}


def blocks_of(model: Model, rank: DecoderRankPlan, loaded: Tensors) -> Iterator[Block]:
    """A rank's parameters taken apart, by the heads, columns and rows that its plan gives it."""
    query, kv = (
        (start * model.head_dim, stop * model.head_dim)
        for start, stop in (rank.heads.query, rank.heads.kv)
    )
    is_gated = model.naming is not GPT2
    split = {
        "embed_tokens": [("embed", rank.vocab)],
        "lm_head": [("embed" if model.tied else "head", rank.vocab)],
        "qkv_proj": [("q", query), ("k", kv), ("v", kv)],
        "o_proj": [("o", query)],
        "up_proj": [("gate", rank.mlp), ("up", rank.mlp)] if is_gated else [("up", rank.mlp)],
        "down_proj": [("down", rank.mlp)],
    }
    for name, values in loaded.items():
        *path, module, kind = name.split(".")
        layer = "".join(f"{step}." for step in path[:2])
        held = ".".join([*path[2:], module])
        is_rowwise = module in ("o_proj", "down_proj")
        if module not in split:
            yield Block(f"{layer}{PART_OF.get(held, module)}.{kind}", values)
            continue
        dim = int(is_rowwise)
        sizes = [stop - start for _, (start, stop) in split[module]]
        padding = values.shape[dim] - sum(sizes)
        assert padding == 0 or module in ("embed_tokens", "lm_head")
        *blocks, rest = torch.split(values, [*sizes, padding], dim)
        assert not rest.any(), "rows of no token are zero"
        for (part, held), block in zip(split[module], blocks, strict=True):
            yield Block(f"{layer}{part}.{kind}", block, dim, held)


def assert_tiles(model: Model, plan: DecoderPlan, loaded: list[Tensors]) -> None:
    """All ranks together hold the model exactly, and no part of it in more places than it must be.

    A split part is on one rank; a KV head on every rank with a query head of its group; the rest
    on all ranks of a stage. Each part is in one stage, but for an embedding that is the head, too.
    """
    parts = model.parts()
    whole = {part: torch.full_like(values, torch.nan) for part, values in parts.items()}
    holders = {part: torch.zeros_like(values) for part, values in parts.items()}
    stages, is_split = defaultdict(set), {}
    for rank, tensors in zip(plan.ranks, loaded, strict=True):
        for block in blocks_of(model, rank, tensors):
            place = block.within(whole[block.part])
            assert place.shape == block.values.shape
            seen = ~place.isnan()
            assert torch.equal(place[seen], block.values[seen]), "equal on every holder"
            place.copy_(block.values)
            block.within(holders[block.part]).add_(1)
            stages[block.part].add(rank.stage)
            is_split[block.part] = block.dim is not None
    for part, values in parts.items():
        assert torch.equal(whole[part], values), part
        assert len(stages[part]) == 1 or (model.tied and part == "embed.weight")
        tp_size = plan.tp_sizes[min(stages[part])]
        is_replicated = tp_size > model.kv_heads and part.split(".")[-2] in ("k", "v")
        expected = len(stages[part]) if is_split[part] else tp_size
        assert is_replicated or (holders[part] == expected).all(), part


@st.composite
def models(draw: st.DrawFn) -> Model:
    naming = draw(st.sampled_from([LLAMA, LLAMA_BIAS, QWEN2, PHI3, GPT2]))
    kv_heads, head_dim = draw(st.integers(1, 6)), draw(st.sampled_from([2, 4, 6]))
    return Model(
        naming,
        num_layers=draw(st.integers(1, 3)),
        hidden=kv_heads * head_dim if naming is GPT2 else draw(st.integers(1, 12)),
        mlp=draw(st.integers(8, 160)),
        vocab=draw(st.integers(1, 40)),
        kv_heads=kv_heads,
        group=1 if naming is GPT2 else draw(st.integers(1, 4)),
        head_dim=head_dim,
        tied=draw(st.booleans()),
    )


TP_SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=3)

# 9 query and 3 KV heads, as SmolLM2-135M has them, and a vocabulary that no size divides.
UNEVEN = Model(LLAMA, 2, hidden=10, mlp=97, vocab=31, kv_heads=3, group=3, head_dim=2, tied=True)


@settings(deadline=None, max_examples=80)
@given(models(), TP_SIZES, st.integers(1, 3), st.booleans())
@example(UNEVEN, [2], 1, False)
@example(UNEVEN, [4], 1, False)
@example(replace(UNEVEN, num_layers=12), [3, 2, 1], 2, True)
@example(replace(UNEVEN, vocab=5), [8], 1, False)
def test_all_ranks_together_hold_the_checkpoint(
    model: Model, tp_sizes: list[int], num_files: int, is_base: bool
) -> None:
    """For any sizes, any cut and any way of storing; a base model's head must be its embedding."""
    tp_sizes = [min(size, model.kv_heads * model.group) for size in tp_sizes]
    with tempfile.TemporaryDirectory() as name:
        folder = model.write(Path(name), num_files=num_files, is_base=is_base and model.tied)
        spec, plan = divide(folder, tp_sizes)
        assert_tiles(model, plan, [read(spec, plan, rank.rank) for rank in plan.ranks])


EVEN = Model(LLAMA, 1, hidden=8, mlp=64, vocab=16, kv_heads=2, group=2, head_dim=2)


def test_a_loader_that_gives_every_rank_the_first_ones_slices_is_caught(tmp_path: Path) -> None:
    """With even shares all shapes agree, so that only the values can tell."""
    spec, plan = divide(EVEN.write(tmp_path), [2])
    first, second = read(spec, plan, 0), read(spec, plan, 1)
    assert_tiles(EVEN, plan, [first, second])
    for wrong in ([first, first], [second, first]):
        with pytest.raises(AssertionError):
            assert_tiles(EVEN, plan, wrong)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")],
)
def test_weights_are_converted_on_the_way(tmp_path: Path, stored: str, wanted: str) -> None:
    spec, plan = divide(EVEN.write(tmp_path, dtype=stored), [2], dtype=wanted)
    down = EVEN.stored()["model.layers.0.mlp.down_proj.weight"][:, 32:]
    local = read(spec, plan, 1)["layers.0.mlp.down_proj.weight"]
    assert local.dtype == getattr(torch, wanted)
    assert torch.equal(local, down.to(getattr(torch, stored)).to(local.dtype))


def test_a_file_that_breaks_after_planning_is_named_with_its_tensor(tmp_path: Path) -> None:
    spec, plan = divide(EVEN.write(tmp_path), [1])
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError) as caught:
        read(spec, plan, 0)
    assert str(caught.value).startswith(
        f"{file}: cannot read tensor model.embed_tokens.weight (Error while deserializing header"
    )


LARGE = Model(LLAMA, 1, hidden=1024, mlp=24_576, vocab=1024, kv_heads=4, group=4, head_dim=64)
"""320 MB, nearly all of it in three matrices of the MLP, which are read last."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(LARGE.write(tmp_path_factory.mktemp("large")))


@pytest.mark.dist
@pytest.mark.parametrize("tp_size", [1, 2])
def test_loading_takes_the_slices_and_one_block(
    tp_size: int, large: str, rank_pool: RankPool
) -> None:
    """A reader of whole tensors is measured, too, to show that the limit tells the two apart."""
    largest = max(4 * math.prod(shape) for shape in LARGE.shapes().values()) // tp_size
    sliced = rank_pool.run(parallel_jobs.load_memory, [tp_size], large, False)
    whole = rank_pool.run(parallel_jobs.load_memory, [tp_size], large, True)
    for (weight_bytes, peak), (_, peak_of_whole) in zip(sliced, whole, strict=True):
        limit = weight_bytes + largest + 20_000_000
        assert 0.99 * weight_bytes < peak <= limit < peak_of_whole
