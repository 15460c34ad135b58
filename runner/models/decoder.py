"""One decoder for all families: the part of it that one rank of one pipeline stage runs.

What differs between families is in `DecoderConfig`; how weights are split is in the plan. A stage
is a sequence of parts (`runner.models.decoder_parts`), each of which can be compiled, with
collectives, attention and the cache between them. `DecoderStage.forward` is that sequence.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from parallel.collectives import Group, all_reduce
from parallel.decoder_plan import DecoderRankPlan, DecoderStagePlan
from parallel.layers import ParallelLMHead, RowParallelLinear, VocabParallelEmbedding
from runner.models.attention import Attention
from runner.models.batch import Batch
from runner.models.config import DecoderConfig
from runner.models.decoder_parts import MLP, QKV, AddMLP, AddQKV, Block, Head, Residual
from runner.models.norm import make_norm
from runner.models.part import Execute, Part, Shape
from runner.models.rope import cos_sin, frequencies

Rotation = tuple[torch.Tensor, ...]
"""cos and sin of every token, each (num_tokens, 1, rotary_dim / 2); empty without rope."""


class DecoderLayer(nn.Module):
    """What one rank holds of one layer; `DecoderStage` makes the parts of it."""

    def __init__(self, config: DecoderConfig, rank_plan: DecoderRankPlan, *, index: int) -> None:
        super().__init__()
        self.window = config.windows[index]
        self.attention = QKV(config, rank_plan)
        self.o_proj = RowParallelLinear(
            rank_plan.heads.num_query * config.head_dim, config.hidden_size
        )
        self.attention_residual = Residual(config, bias=config.o_bias)
        self.mlp = MLP(config, rank_plan)
        self.mlp_residual = Residual(config, bias=config.mlp_bias)


class DecoderStage(nn.Module):
    """One rank's share of one pipeline stage; parameters keep the model's global layer indices.

    Attributes:
        parts: what `forward` executes, by name and in order.
    """

    def __init__(
        self,
        config: DecoderConfig,
        stage: DecoderStagePlan,
        rank_plan: DecoderRankPlan,
        group: Group,
        *,
        attend: Attention,
        max_model_len: int,
        dtype: torch.dtype,
    ) -> None:
        """Build the module without memory, on the meta device; `load` fills it.

        Args:
            group: the stage's tensor-parallel group.
            max_model_len: what length-dependent rotary frequencies are made for, in tokens.
        """
        super().__init__()
        self.config = config
        self.attend = attend
        self.dtype = dtype
        self._group = group
        self._max_model_len = max_model_len
        self._ropes: list[tuple[torch.Tensor, float]] = []
        with torch.device("meta"):
            self._build(stage, rank_plan)
        self.to(dtype)
        self.parts = dict(self._parts(rank_plan))

    def _build(self, stage: DecoderStagePlan, rank_plan: DecoderRankPlan) -> None:
        config, group = self.config, self._group
        self.layer_indices = range(*stage.layers)
        padded, hidden_size = stage.padded_vocab, config.hidden_size
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.embed_positions: nn.Embedding | None = None
        if stage.has_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                padded, hidden_size, rows=rank_plan.vocab, group=group
            )
            if config.learned_positions:
                self.embed_positions = nn.Embedding(config.max_positions, hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(index): DecoderLayer(config, rank_plan, index=index)
                for index in self.layer_indices
            }
        )
        self.norm = make_norm(config, hidden_size) if stage.has_norm else None
        self.lm_head: ParallelLMHead | None = None
        if stage.has_head:
            self.lm_head = ParallelLMHead(
                padded, hidden_size, vocab_size=config.vocab_size, group=group
            )

    def _parts(self, rank_plan: DecoderRankPlan) -> Iterator[tuple[str, Part]]:
        """The sequence of `forward`, name by name."""
        x: Shape = (self.config.hidden_size,)
        heads: Shape = (rank_plan.heads.num_query * self.config.head_dim,)

        def part(kind: str, module: nn.Module, *shapes: Shape, per_sample: bool = False) -> Part:
            return Part(kind, module, shapes, self.dtype, per_sample)

        for index, layer, following in self._layers_in_pairs():
            name = f"layers.{index}"
            if index == self.layer_indices.start:
                rotation = self._rotation_shapes(index)
                yield f"{name}.qkv", part("qkv", layer.attention, x, *rotation)
            add_mlp = AddMLP(layer.attention_residual, layer.mlp)
            end: AddQKV | Residual = layer.mlp_residual
            kind, rotation = "add", ()
            if following is not None:
                end = AddQKV(layer.mlp_residual, following.attention)
                kind, rotation = "add_qkv", self._rotation_shapes(index + 1)
            if self._group.size == 1:
                block = Block(layer.o_proj, add_mlp, end)
                kind = "block" if following is not None else "last_block"
                yield f"{name}.block", part(kind, block, x, heads, *rotation)
            else:
                yield f"{name}.o_proj", part("o_proj", layer.o_proj, heads)
                yield f"{name}.add_mlp", part("add_mlp", add_mlp, x, x)
                yield f"{name}.end", part(kind, end, x, x, *rotation)
        if self.norm is not None and self.lm_head is not None:
            yield "head", part("head", Head(self.norm, self.lm_head), x, per_sample=True)

    def parts_by_kind(self) -> dict[str, Part]:
        """The first part of each kind; what another one of its kind compiles to is the same."""
        found: dict[str, Part] = {}
        for part in self.parts.values():
            found.setdefault(part.kind, part)
        return found

    def _layers_in_pairs(self) -> Iterator[tuple[int, DecoderLayer, DecoderLayer | None]]:
        """Each layer with the one that follows it in the stage."""
        for index in self.layer_indices:
            following = index + 1 in self.layer_indices
            yield index, self._layer(index), self._layer(index + 1) if following else None

    def _layer(self, index: int) -> DecoderLayer:
        layer = self.layers[str(index)]
        assert isinstance(layer, DecoderLayer)
        return layer

    def _rotation_shapes(self, index: int) -> tuple[Shape, ...]:
        if not self.config.ropes:
            return ()
        rope = self.config.ropes[self.config.rope_of_layer[index]]
        return ((1, rope.rotary_dim // 2),) * 2

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over every parameter by name, without a copy."""
        for name, tensor in tensors:
            module_name, _, parameter = name.rpartition(".")
            loaded = nn.Parameter(tensor, requires_grad=False)
            setattr(self.get_submodule(module_name), parameter, loaded)
        if self.config.tied and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight
        missing = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        assert not missing, f"the plan holds no tensor for {missing}"
        for rope in self.config.ropes:
            table, scale = frequencies(rope, self._max_model_len)
            self._ropes.append((table.to(next(self.parameters()).device), scale))

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        caches: Mapping[int, torch.Tensor],
        x: torch.Tensor | None,
        execute: Execute | None = None,
    ) -> torch.Tensor:
        """Run the stage on one step's tokens.

        Args:
            caches: for each layer index its KV cache; see `runner.models.attention.Attention`.
            x: (num_tokens, hidden), the carry from the stage before; None on the first stage.
            execute: runs the parts; None: as they are, by PyTorch.

        Returns:
            (num_tokens, hidden) for the next stage, or on the last one (num_samples, vocab_size)
            logits.
        """
        run = execute or self.run_eagerly
        x = self._embed(batch) if x is None else x
        rotations: list[Rotation] = [
            cos_sin(table, scale, batch.positions, batch.rope_variants, x.dtype)
            for table, scale in self._ropes
        ]
        qkv: tuple[torch.Tensor, ...] = ()
        for index in self.layer_indices:
            name, layer = f"layers.{index}", self._layer(index)
            qkv = qkv or run(f"{name}.qkv", x, *self._rotation(rotations, index))
            q, k, v = qkv
            scale, window = self.config.query_scale, layer.window
            heads = self.attend(q, k, v, caches[index], batch, scale=scale, window=window)
            rotation = self._rotation(rotations, index + 1)
            if self._group.size == 1:
                x, *qkv_list = run(f"{name}.block", x, heads, *rotation)
            else:
                delta = all_reduce(run(f"{name}.o_proj", heads)[0], self._group)
                x, delta = run(f"{name}.add_mlp", x, delta)
                delta = all_reduce(delta, self._group)
                x, *qkv_list = run(f"{name}.end", x, delta, *rotation)
            qkv = tuple(qkv_list)
        if self.lm_head is None:
            return x
        if not len(batch.logits_rows):
            return x.new_empty(0, self.config.vocab_size)
        return self._logits(x[batch.logits_rows], run)

    def run_eagerly(self, name: str, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A part by PyTorch's own kernels."""
        outputs = self.parts[name].module(*activations)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _rotation(self, rotations: list[Rotation], index: int) -> Rotation:
        """What a layer's queries and keys are rotated by; nothing beyond the stage's last."""
        if not rotations or index not in self.layer_indices:
            return ()
        return rotations[self.config.rope_of_layer[index]]

    def _embed(self, batch: Batch) -> torch.Tensor:
        assert self.embed_tokens is not None, "a stage without an embedding needs a carry"
        x: torch.Tensor = self.embed_tokens(batch.token_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(batch.positions)
        if self.config.embedding_scale == 1.0:
            return x
        # Gemma rounds its scale to the activations' dtype before it multiplies.
        return x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)

    def _logits(self, x: torch.Tensor, run: Execute) -> torch.Tensor:
        assert self.lm_head is not None
        logits = self.lm_head.gather(run("head", x)[0])
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
