"""Plans made from file headers alone: which block of which tensor lies on which rank, and why not.

That the blocks hold the right values once they are read is shown in test_weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint import Checkpoint, TensorInfo
from parallel.decoder_plan import DecoderPlan
from parallel.errors import ConfigError, IntegrityError
from parallel.layout import ModelLayout
from parallel.plan import Carry, LocalTensor, Piece
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.models.config import HFConfig
from runner.models.families import FAMILIES
from runner.models.layout import layout_of
from runner.models.spec import ModelSpec

Values = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FILE = Path("/models/tiny/model.safetensors")
LAYER = "model.layers.1"
LIMITS = Limits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)

# SmolLM2's heads on a small scale: 9 query heads that share 3 KV heads, of 2 features each.
TINY: Values = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 20,
    "intermediate_size": 30,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 2,
    "vocab_size": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}
TIED = TINY | {"tie_word_embeddings": True}


def make_layout(values: Values) -> ModelLayout:
    family = FAMILIES[values["architectures"][0]]
    return layout_of(family.read(HFConfig(FILE.with_name("config.json"), values)), family.names)


def llama_shapes(values: Values) -> Shapes:
    """What a Llama checkpoint holds; matrices are (out, in)."""
    hidden, mlp, vocab = (values[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    query = values["num_attention_heads"] * values["head_dim"]
    kv = values["num_key_value_heads"] * values["head_dim"]
    layer: Shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(values["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    is_tied = values.get("tie_word_embeddings")
    return shapes if is_tied else shapes | {"lm_head.weight": (vocab, hidden)}


def headers(shapes: Shapes) -> Checkpoint:
    """A checkpoint in float32 of which only the headers are there."""
    tensors = {name: TensorInfo(FILE, "F32", shape) for name, shape in shapes.items()}
    return Checkpoint(FILE.parent, tensors)


def divide(
    tp_sizes: Sequence[int],
    values: Values = TINY,
    *,
    shapes: Shapes | None = None,
    stages: list[list[str]] | None = None,
    dtype: str = "float32",
    limits: Limits = LIMITS,
) -> DecoderPlan:
    """The plan of a model with one stage for each of `tp_sizes`."""
    return make_plan(
        make_layout(values),
        headers(llama_shapes(values) if shapes is None else shapes),
        Topology.of(tp_sizes),
        architecture=values["architectures"][0],
        dtype=dtype,
        limits=limits,
        stages=stages,
    )


def tensor(plan: DecoderPlan, rank: int, name: str) -> LocalTensor:
    (found,) = [tensor for tensor in plan.ranks[rank].tensors if tensor.name == name]
    return found


def names(plan: DecoderPlan, rank: int) -> set[str]:
    return {tensor.name for tensor in plan.ranks[rank].tensors}


def test_qkv_is_merged_from_the_blocks_of_the_ranks_heads() -> None:
    """The third of four ranks: query heads 5 and 6, which read KV heads 1 and 2."""
    plan = divide([4])
    rank = plan.ranks[2]
    assert (rank.heads.query, rank.heads.kv, rank.heads.query_to_kv) == ((5, 7), (1, 3), (0, 1))
    assert tensor(plan, 2, "layers.1.attention.qkv_proj.weight") == LocalTensor(
        name="layers.1.attention.qkv_proj.weight",
        shape=(4 + 4 + 4, 20),
        dim=0,
        pieces=(
            Piece(f"{LAYER}.self_attn.q_proj.weight", 0, (10, 14)),
            Piece(f"{LAYER}.self_attn.k_proj.weight", 0, (2, 6)),
            Piece(f"{LAYER}.self_attn.v_proj.weight", 0, (2, 6)),
        ),
    )


def test_a_row_parallel_matrix_is_cut_along_its_input() -> None:
    assert tensor(divide([2]), 1, "layers.1.o_proj.weight") == LocalTensor(
        name="layers.1.o_proj.weight",
        shape=(20, 6),
        dim=1,
        pieces=(Piece(f"{LAYER}.self_attn.o_proj.weight", 1, (12, 18)),),
    )


def test_norms_are_whole_on_every_rank() -> None:
    plan = divide([3])
    for rank in range(3):
        norm = tensor(plan, rank, "layers.1.mlp.norm.weight")
        assert norm.shape == (20,)
        assert norm.pieces == (Piece(f"{LAYER}.post_attention_layernorm.weight"),)


def test_a_padded_vocabulary_ends_early() -> None:
    """Ten rows over four ranks: three each, one on the last."""
    plan = divide([4])
    head = tensor(plan, 3, "lm_head.weight")
    assert (plan.stages[0].padded_vocab, plan.ranks[3].vocab) == (3, (9, 10))
    assert head.shape == (3, 20)
    assert head.pieces == (Piece("lm_head.weight", 0, (9, 10)),)


def test_a_rank_beyond_a_tiny_vocabulary_reads_none_of_it() -> None:
    head = tensor(divide([4], TINY | {"vocab_size": 5}), 3, "lm_head.weight")
    assert (head.shape, head.pieces) == ((2, 20), ())


def divide_variant(
    folder: Path, tp_sizes: list[int], *, stages: list[list[str]] | None = None
) -> DecoderPlan:
    """The plan of a checkpoint that transformers wrote."""
    spec = ModelSpec.open(folder)
    return make_plan(
        spec.layout,
        spec.checkpoint,
        Topology.of(tp_sizes),
        architecture=spec.config.architecture,
        dtype="float32",
        limits=LIMITS,
        stages=stages,
    )


def test_a_fused_tensor_is_read_block_by_block(checkpoint: Callable[[str], Path]) -> None:
    """Phi-3 stores Q, K and V as one matrix, here of 48 rows, 24 and 24; gate and up likewise."""
    plan = divide_variant(checkpoint("phi3"), [2])
    source = f"{LAYER}.self_attn.qkv_proj.weight"
    assert tensor(plan, 1, "layers.1.attention.qkv_proj.weight").pieces == (
        Piece(source, 0, (32, 48)),
        Piece(source, 0, (48 + 16, 48 + 24)),
        Piece(source, 0, (72 + 16, 72 + 24)),
    )
    source = f"{LAYER}.mlp.gate_up_proj.weight"
    assert tensor(plan, 1, "layers.1.mlp.up_proj.weight").pieces == (
        Piece(source, 0, (49, 97)),
        Piece(source, 0, (97 + 49, 97 + 97)),
    )


def test_a_conv1d_is_cut_along_the_other_stored_dim(checkpoint: Callable[[str], Path]) -> None:
    """GPT-2 stores (in, out): the output features, 3 x 42 for Q, K and V, are dim 1 of the file."""
    plan = divide_variant(checkpoint("gpt2"), [3])
    source = "transformer.h.1.attn.c_attn.weight"
    assert tensor(plan, 1, "layers.1.attention.qkv_proj.weight") == LocalTensor(
        name="layers.1.attention.qkv_proj.weight",
        shape=(3 * 14, 42),
        dim=0,
        pieces=tuple(Piece(source, 1, (start + 14, start + 28)) for start in (0, 42, 84)),
        transposed=True,
    )
    assert tensor(plan, 1, "layers.1.mlp.down_proj.weight") == LocalTensor(
        name="layers.1.mlp.down_proj.weight",
        shape=(42, 32),
        dim=1,
        pieces=(Piece("transformer.h.1.mlp.c_proj.weight", 0, (32, 64)),),
        transposed=True,
    )


def test_a_bias_is_split_with_its_output_or_whole_after_a_reduce(
    checkpoint: Callable[[str], Path],
) -> None:
    plan = divide_variant(checkpoint("gpt2"), [3])
    split = tensor(plan, 2, "layers.1.mlp.up_proj.bias")
    assert split.pieces == (Piece("transformer.h.1.mlp.c_fc.bias", 0, (64, 95)),)
    whole = tensor(plan, 2, "layers.1.mlp_residual.bias")
    assert (whole.shape, whole.pieces) == ((42,), (Piece("transformer.h.1.mlp.c_proj.bias"),))


def test_stages_know_what_they_run_and_what_they_send() -> None:
    plan = divide([2, 1])
    first, last = plan.stages
    assert (first.layers, last.layers) == ((0, 2), (2, 3))
    assert first.modules == ("model.embed_tokens", "model.layers.0", "model.layers.1")
    assert last.modules == ("model.layers.2", "model.norm", "lm_head")
    assert (first.has_embedding, first.has_norm, first.has_head) == (True, False, False)
    assert (last.has_embedding, last.has_norm, last.has_head) == (False, True, True)
    assert first.carries == (Carry("hidden_states", "float32", ("num_tokens", 20)),)
    assert last.carries == ()
    assert (first.padded_vocab, last.padded_vocab) == (5, 10)


def test_ranks_hold_the_layers_of_their_stage_alone() -> None:
    """Twelve layers, so that layer 1 is told from 10 and 11."""
    plan = divide([2, 1, 1], TINY | {"num_hidden_layers": 12})
    for rank in plan.ranks:
        held = {int(name.split(".")[1]) for name in names(plan, rank.rank) if "layers." in name}
        assert held == set(range(*plan.stages[rank.stage].layers))
    assert [stage.layers for stage in plan.stages] == [(0, 6), (6, 9), (9, 12)]
    assert names(plan, 0) == names(plan, 1)


def test_a_stage_costs_what_a_step_reads() -> None:
    """All weights in the plan's dtype but the embedding, which is looked up."""
    plan = divide([2, 1, 1], TINY | {"num_hidden_layers": 12}, dtype="bfloat16")
    layer = 2 * (20 * (18 + 6 + 6 + 18) + 3 * 20 * 30 + 2 * 20)
    assert [stage.cost for stage in plan.stages] == [
        6 * layer,
        3 * layer,
        3 * layer + 2 * (20 + 10 * 20),
    ]


def test_an_explicit_cut_is_followed() -> None:
    stages = [["model.embed_tokens", "model.layers.0"], ["model.layers.{1..2}", "model.norm", "*"]]
    plan = divide([1, 2], stages=stages)
    assert [stage.layers for stage in plan.stages] == [(0, 1), (1, 3)]


def test_a_cut_between_the_two_embeddings_is_refused(checkpoint: Callable[[str], Path]) -> None:
    """GPT-2 adds its positions to its tokens before anything is sent on."""
    stages = [["transformer.wte"], ["transformer.wpe", "transformer.h.*", "transformer.ln_f", "*"]]
    with pytest.raises(ConfigError, match=r"transformer\.wpe"):
        divide_variant(checkpoint("gpt2"), [1, 1], stages=stages)


def test_a_tied_head_in_the_embeddings_stage_needs_no_tensor() -> None:
    plan = divide([2], TIED)
    assert "lm_head.weight" not in names(plan, 0) | names(plan, 1)
    assert plan.stages[0].has_head


def test_a_tied_head_in_another_stage_holds_the_embedding_once_more() -> None:
    """Each stage splits it over its own ranks: five rows of ten, and all ten."""
    plan = divide([2, 1], TIED)
    embedding, head = tensor(plan, 1, "embed_tokens.weight"), tensor(plan, 2, "lm_head.weight")
    assert embedding.pieces == (Piece("model.embed_tokens.weight", 0, (5, 10)),)
    assert head.pieces == (Piece("model.embed_tokens.weight", 0, (0, 10)),)


def test_a_tied_checkpoint_that_stores_the_head_too_is_accepted() -> None:
    plan = divide([1], TIED, shapes=llama_shapes(TINY))
    assert "lm_head.weight" not in names(plan, 0)


def test_kv_bytes_follow_the_ranks_kv_heads_and_layers() -> None:
    """Keys and values of 2 features in float32, for each KV head and layer that a rank has."""
    plan = divide([2, 1])
    per_head_and_layer = 2 * 2 * 4
    heads_times_layers = [2 * 2, 1 * 2, 3 * 1]
    assert [rank.kv_bytes_per_token for rank in plan.ranks] == [
        n * per_head_and_layer for n in heads_times_layers
    ]


def test_dtype_sets_the_bytes_of_weights_and_cache() -> None:
    wide, narrow = divide([2]).ranks[0], divide([2], dtype="bfloat16").ranks[0]
    assert wide.weight_bytes == 2 * narrow.weight_bytes
    assert wide.kv_bytes_per_token == 2 * narrow.kv_bytes_per_token


def test_activations_grow_with_the_step_and_the_head_adds_logits() -> None:
    small, large = (
        divide([1, 1], limits=Limits(64, 4, max_num_batched_tokens=n)).ranks for n in (32, 64)
    )
    assert all(a.activation_bytes < b.activation_bytes for a, b in zip(small, large, strict=True))
    few, many = (divide([1, 1], limits=Limits(64, n, 32)).ranks for n in (4, 8))
    assert few[0].activation_bytes == many[0].activation_bytes
    assert many[1].activation_bytes - few[1].activation_bytes >= 4 * 10 * 4


def test_a_wrong_shape_names_file_tensor_and_both_shapes() -> None:
    shapes = llama_shapes(TINY) | {f"{LAYER}.self_attn.k_proj.weight": (18, 20)}
    with pytest.raises(IntegrityError) as caught:
        divide([2], shapes=shapes)
    assert str(caught.value) == (
        f"{FILE}: tensor {LAYER}.self_attn.k_proj.weight has shape [18, 20], but config.json "
        "implies [6, 20]"
    )


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64"])
def test_a_dtype_that_cannot_be_loaded_names_file_and_tensor(dtype: str) -> None:
    checkpoint = headers(llama_shapes(TINY))
    changed = {f"{LAYER}.mlp.up_proj.weight": TensorInfo(FILE, dtype, (30, 20))}
    checkpoint = Checkpoint(checkpoint.folder, {**checkpoint.tensors, **changed})
    with pytest.raises(IntegrityError) as caught:
        make_plan(
            make_layout(TINY),
            checkpoint,
            Topology.of([1]),
            architecture="LlamaForCausalLM",
            dtype="float32",
            limits=LIMITS,
        )
    assert str(caught.value) == (
        f"{FILE}: tensor {LAYER}.mlp.up_proj.weight has dtype {dtype}; F32, F16, BF16 can be loaded"
    )


def test_a_checkpoint_of_another_size_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"tensor model\.layers\.3\..* is matched by no rule"):
        divide([1], TINY, shapes=llama_shapes(TINY | {"num_hidden_layers": 4}))


@pytest.mark.parametrize("tp_sizes", [[10], [1, 10]])
def test_every_stage_needs_a_head_for_each_rank(tp_sizes: list[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        divide(tp_sizes)
    assert str(caught.value) == (
        "tensor_parallel_size=10 exceeds num_attention_heads=9; use 1 to 9"
    )


def test_every_rank_needs_columns_of_the_mlp() -> None:
    with pytest.raises(
        ConfigError, match=r"^tensor_parallel_size=4 exceeds intermediate_size=3; use 1 to 3$"
    ):
        divide([4], TINY | {"intermediate_size": 3})


def test_no_more_stages_than_modules() -> None:
    """Three layers, the norm and the head."""
    with pytest.raises(ConfigError, match=r"^pipeline_parallel_size=6 exceeds the 5 modules"):
        divide([1] * 6)
