"""Plans made from file headers alone: which block of which tensor lies on which rank, and why not.

That the blocks hold the right values once they are read is shown in test_weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.checkpoint import Checkpoint, TensorInfo
from parallel.errors import ConfigError, IntegrityError
from parallel.plan import LocalTensor, Piece, ShardPlan
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.models.config import DecoderConfig
from runner.models.families import FAMILIES
from runner.models.layout import layout_of

Shapes = dict[str, tuple[int, ...]]

FILE = Path("/models/tiny/model.safetensors")

# SmolLM2's head counts on a small scale: 9 query heads in 3 groups.
TINY = DecoderConfig(
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=20,
    intermediate_size=30,
    vocab_size=10,
    num_heads=9,
    num_kv_heads=3,
    head_dim=2,
    max_positions=64,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    query_scale=1.0,
    windows=(None,) * 3,
    ropes=(),
    rope_of_layer=(0,) * 3,
    tied=False,
    dtype="float32",
)

LLAMA_70B = replace(
    TINY,
    num_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    vocab_size=128256,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
)


def llama_shapes(config: DecoderConfig) -> Shapes:
    """What a Llama checkpoint holds, (out, in)."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
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
        for i in range(config.num_layers)
        for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    shapes |= {"model.norm.weight": (hidden,)}
    return shapes if config.tied else shapes | {"lm_head.weight": (config.vocab_size, hidden)}
