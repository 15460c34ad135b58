"""From a model's layout and a checkpoint's headers to a `DecoderPlan`.

Needs no GPU and reads no weights. Choosing how many ranks to use is `parallel.autoplan`; this file
is told.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.checkpoint import LOADABLE_BYTES, Checkpoint, TensorInfo
from parallel.decoder_plan import DecoderPlan, DecoderRankPlan, DecoderStagePlan
from parallel.errors import ConfigError, IntegrityError
from parallel.layout import ModelLayout, Split
from parallel.partition import Cut, Unit, cut_by_cost, cut_by_patterns
from parallel.plan import DTYPE_BYTES, Carry, LocalTensor, Piece
from parallel.rules import LAYER, Rule, check_strict, expand
from parallel.topology import Topology

MASK_ROWS = 512
"""Queries that attention masks at a time, over the whole length of a sequence."""


@dataclass(frozen=True)
class Limits:
    """How much of a model one job uses at a time.

    Attributes:
        max_model_len: tokens of one sequence, prompt and completion together.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one step.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


def make_plan(
    layout: ModelLayout,
    checkpoint: Checkpoint,
    topology: Topology,
    *,
    architecture: str,
    dtype: str,
    limits: Limits,
    stages: Sequence[Sequence[str]] | None = None,
) -> DecoderPlan:
    """Divide a model.

    Args:
        layout: the model's units, rules and sizes.
        checkpoint: its tensors.
        topology: ranks and devices.
        architecture: the model's class name, kept for the reader of the plan.
        dtype: of weights and activations, such as "bfloat16".
        limits: what activations are sized for.
        stages: patterns of module names for each stage; None: cut by cost.

    Raises:
        ConfigError: a cut or a size that is not possible for this model.
        IntegrityError: a tensor that is missing, unexpected, of the wrong shape or of a dtype that
            cannot be loaded.
    """
    rules = expand(layout.rules, layout.num_layers)
    check_strict(rules, checkpoint.tensors, ignored=layout.ignored, where=str(checkpoint.folder))
    _check_tensors(layout, checkpoint)
    for tp_size in set(topology.tp_sizes):
        layout.splits(tp_size)

    units = _units(layout, rules, checkpoint.tensors, DTYPE_BYTES[dtype])
    cut = cut_by_patterns(units, stages) if stages else cut_by_cost(units, topology.tp_sizes)
    _check_embeddings_together(layout, cut)
    divider = _Divider(layout, rules, topology, cut, dtype, limits)
    return DecoderPlan(
        kind="decoder",
        architecture=architecture,
        dtype=dtype,
        max_model_len=limits.max_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        tp_sizes=topology.tp_sizes,
        devices=topology.devices,
        stages=tuple(divider.stage(index) for index in range(topology.num_stages)),
        ranks=tuple(divider.rank(rank) for rank in range(topology.world_size)),
    )


def _units(
    layout: ModelLayout, rules: Sequence[Rule], tensors: Mapping[str, TensorInfo], item_bytes: int
) -> list[Unit]:
    names = [*layout.embeddings]
    names += [
        (layout.layer.replace(LAYER, str(i)), f"layers.{i}") for i in range(layout.num_layers)
    ]
    names += [(layout.norm, "norm"), (layout.head, "lm_head")]
    embeddings = {module for _, module in layout.embeddings}
    return [
        Unit(name, module, 0 if module in embeddings else _cost(module, rules, tensors, item_bytes))
        for name, module in names
    ]


def _cost(
    module: str, rules: Sequence[Rule], tensors: Mapping[str, TensorInfo], item_bytes: int
) -> int:
    sources = [s for rule in rules if _in(rule, {module}) for s in rule.sources]
    return sum(math.prod(tensors[s.name].shape) for s in sources) * item_bytes


def _check_tensors(layout: ModelLayout, checkpoint: Checkpoint) -> None:
    """Shapes that `config.json` implies, and dtypes that can be read."""
    for name, expected in layout.stored_shapes().items():
        info = checkpoint.tensors[name]
        if info.dtype not in LOADABLE_BYTES:
            raise IntegrityError(
                f"{info.file}: tensor {name} has dtype {info.dtype}; "
                f"{', '.join(LOADABLE_BYTES)} can be loaded"
            )
        if info.shape != expected:
            raise IntegrityError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, but "
                f"config.json implies {list(expected)}"
            )


def _check_embeddings_together(layout: ModelLayout, cut: Cut) -> None:
    """They are added up before the first layer, so one stage holds them all."""
    names = [name for name, _ in layout.embeddings]
    first = {unit.name for unit in cut[0]}
    if late := [name for name in names if name not in first]:
        raise ConfigError(
            f"parallel.stages: {late[0]} is in another stage than {names[0]}; put "
            f"{' and '.join(names)} into stage 0"
        )


@dataclass(frozen=True)
class _Divider:
    """The pieces of one plan, made from the same inputs."""

    layout: ModelLayout
    rules: Sequence[Rule]
    topology: Topology
    cut: Cut
    dtype: str
    limits: Limits

    def stage(self, index: int) -> DecoderStagePlan:
        modules = [unit.module for unit in self.cut[index]]
        layers = [int(m.removeprefix("layers.")) for m in modules if m.startswith("layers.")]
        is_last = index == self.topology.last_stage
        hidden = Carry("hidden_states", self.dtype, ("num_tokens", self.layout.hidden_size))
        return DecoderStagePlan(
            modules=tuple(unit.name for unit in self.cut[index]),
            layers=(layers[0], layers[-1] + 1) if layers else (0, 0),
            has_embedding="embed_tokens" in modules,
            has_norm="norm" in modules,
            has_head="lm_head" in modules,
            padded_vocab=self._splits(index)["vocab"].padded or 0,
            carries=() if is_last else (hidden,),
            cost=sum(unit.cost for unit in self.cut[index]),
        )

    def rank(self, rank: int) -> DecoderRankPlan:
        here = self.topology.coordinate(rank)
        splits = self._splits(here.stage)
        heads = self.layout.heads(self.topology.tp_sizes[here.stage])[here.tp_rank]
        tensors = tuple(
            _local_tensor(rule, here.tp_rank, splits) for rule in self._rules_of(here.stage)
        )
        stage = self.stage(here.stage)
        num_layers = stage.layers[1] - stage.layers[0]
        item_bytes = DTYPE_BYTES[self.dtype]
        return DecoderRankPlan(
            rank=rank,
            stage=here.stage,
            tp_rank=here.tp_rank,
            device=self.topology.devices[rank],
            heads=heads,
            mlp=splits["mlp"].ranges[here.tp_rank],
            vocab=splits["vocab"].ranges[here.tp_rank],
            tensors=tensors,
            weight_bytes=sum(math.prod(t.shape) for t in tensors) * item_bytes,
            kv_bytes_per_token=2 * heads.num_kv * self.layout.head_dim * num_layers * item_bytes,
            activation_bytes=self._activation_bytes(rank, stage),
        )

    def _splits(self, stage: int) -> Mapping[str, Split]:
        return self.layout.splits(self.topology.tp_sizes[stage])

    def _rules_of(self, stage: int) -> list[Rule]:
        """The rules of a stage; a head tied to an embedding of the same stage needs no tensor of
        its own.
        """
        modules = {unit.module for unit in self.cut[stage]}
        here = [rule for rule in self.rules if _in(rule, modules)]
        return [rule for rule in here if not (rule.tied and "embed_tokens" in modules)]

    def _activation_bytes(self, rank: int, stage: DecoderStagePlan) -> int:
        """Bytes alive at once in one step, an upper estimate for the eager kernels.

        Three buffers of (tokens, hidden) and two in float32 of a norm; the larger of attention and
        MLP; and on the last stage the logits. Attention holds QKV, rotated Q and K, its output, the
        keys and values of the longest sequence for every query head, and a mask of one chunk of
        queries as bool and as numbers. The MLP holds gate, up, the activation and the product. The
        sampler holds the logits, twice where steps are captured, in float32, and six sorted columns
        of eight bytes.
        """
        here = self.topology.coordinate(rank)
        tp_size = self.topology.tp_sizes[here.stage]
        heads = self.layout.heads(tp_size)[here.tp_rank]
        mlp = self._splits(here.stage)["mlp"].ranges[here.tp_rank]
        item_bytes, head_dim = DTYPE_BYTES[self.dtype], self.layout.head_dim
        tokens, longest = self.limits.max_num_batched_tokens, self.limits.max_model_len
        residual = tokens * self.layout.hidden_size * (3 * item_bytes + 2 * 4)
        projected = tokens * 3 * (heads.num_query + heads.num_kv) * head_dim * item_bytes
        gathered = longest * 2 * (heads.num_kv + heads.num_query) * head_dim * item_bytes
        mask = min(tokens, MASK_ROWS) * longest * (1 + item_bytes)
        layer = max(projected + gathered + mask, tokens * 4 * (mlp[1] - mlp[0]) * item_bytes)
        logit_bytes = 2 * item_bytes + 4 + 6 * 8
        logits = self.limits.max_num_seqs * stage.padded_vocab * tp_size * logit_bytes
        return residual + layer + (logits if stage.has_head else 0)


def _in(rule: Rule, modules: set[str]) -> bool:
    """Whether a rule's target lies in one of the modules, such as layers.7.mlp.down_proj.weight in
    layers.7.
    """
    return any(rule.target.startswith(f"{module}.") for module in modules)


def _local_tensor(rule: Rule, tp_rank: int, splits: Mapping[str, Split]) -> LocalTensor:
    if rule.style == "replicate":
        (source,) = rule.sources
        shape = tuple(extent for extent in rule.shape if extent is not None)
        return LocalTensor(rule.target, shape, 0, (Piece(source.name),), rule.transposed)
    stored_dim = len(rule.shape) - 1 - rule.dim if rule.transposed else rule.dim
    pieces: list[Piece] = []
    size = 0
    for source in rule.sources:
        offset = 0
        for split in (splits[section] for section in source.sections):
            start, stop = split.ranges[tp_rank]
            if start < stop:
                pieces.append(Piece(source.name, stored_dim, (offset + start, offset + stop)))
            size += split.padded or stop - start
            offset += split.total
    shape = tuple(size if extent is None else extent for extent in rule.shape)
    return LocalTensor(rule.target, shape, rule.dim, tuple(pieces), rule.transposed)
