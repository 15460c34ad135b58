"""The layout names the decoder's parameters: every one, of every family, in its local shape."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES

from parallel.collectives import Group
from parallel.decoder_plan import DecoderPlan
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.models.attention import GatherAttention
from runner.models.decoder import DecoderStage
from runner.models.spec import ModelSpec

LIMITS = Limits(max_model_len=32, max_num_seqs=2, max_num_batched_tokens=16)


def plan_of(spec: ModelSpec, tp_sizes: list[int]) -> DecoderPlan:
    return make_plan(
        spec.layout,
        spec.checkpoint,
        Topology.of(tp_sizes),
        architecture=spec.config.architecture,
        dtype="float32",
        limits=LIMITS,
    )


def stage_of(spec: ModelSpec, plan: DecoderPlan, rank: int) -> DecoderStage:
    """A rank's module, without memory."""
    rank_plan = plan.ranks[rank]
    tp_size = plan.tp_sizes[rank_plan.stage]
    return DecoderStage(
        spec.config,
        plan.stages[rank_plan.stage],
        rank_plan,
        Group(tuple(range(tp_size)), rank_plan.tp_rank),
        attend=GatherAttention(rank_plan.heads, torch.device("cpu")),
        max_model_len=LIMITS.max_model_len,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("tp_sizes", [[1], [2], [3, 1], [1, 2]], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_holds_every_parameter_of_its_stages(
    name: str, tp_sizes: list[int], checkpoint: Callable[[str], Path]
) -> None:
    spec = ModelSpec.open(checkpoint(name))
    plan = plan_of(spec, tp_sizes)
    for rank_plan in plan.ranks:
        stage = stage_of(spec, plan, rank_plan.rank)
        needed = {name: tuple(p.shape) for name, p in stage.named_parameters()}
        if spec.config.tied and stage.embed_tokens and stage.lm_head:
            assert needed.pop("lm_head.weight") == needed["embed_tokens.weight"]
        assert {tensor.name: tensor.shape for tensor in rank_plan.tensors} == needed


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_checkpoint_is_read(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    spec = ModelSpec.open(checkpoint(name))
    plan = plan_of(spec, [2, 1])
    read = {
        piece.source for rank in plan.ranks for tensor in rank.tensors for piece in tensor.pieces
    }
    assert read == set(spec.checkpoint.tensors)


def test_layer_patterns_have_one_place_for_the_index(checkpoint: Callable[[str], Path]) -> None:
    for name in ("llama", "gpt2"):
        layout = ModelSpec.open(checkpoint(name)).layout
        assert layout.layer.count("*") == 1
        for rule in layout.rules:
            stars = {text.count("*") for text in (rule.target, *(s.name for s in rule.sources))}
            assert stars == {1 if rule.target.startswith("layers.") else 0}
