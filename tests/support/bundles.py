"""Bundles of a small model on two stages of 2 and 1 ranks; weights are real, engines are bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from parallel.decoder_plan import DecoderPlan
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from parallel.weights import stream
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.manifest import Artefact, Candidate, Choice, Manifest
from runner.bundle.source import read_source, source_digest
from runner.models.spec import ModelSpec

ENGINE = hashlib.sha256(b"engine").hexdigest()
LIBRARY = hashlib.sha256(b"library").hexdigest()
EAGER = hashlib.sha256(b"eager").hexdigest()

FILES: dict[str, dict[str, bytes]] = {
    ENGINE: {"engine.trt": b"an engine" * 500},
    LIBRARY: {"model.so": b"\x7fELF" * 300, "kernels/a.cubin": b"sm_90" * 90},
    EAGER: {},
}
ARTEFACTS = {
    ENGINE: Artefact("tensorrt", "mlp", 1),
    LIBRARY: Artefact("inductor", "qkv", 1),
    EAGER: Artefact("eager", "qkv", 16),
}
USES = {"mlp": {1: ENGINE}, "qkv": {1: LIBRARY, 16: EAGER}}
CHOICE = Choice(
    "mlp",
    1,
    0,
    (
        Candidate("tensorrt", ENGINE, 52.25, True, ""),
        Candidate("inductor", LIBRARY, None, None, "not installed"),
        Candidate("eager", EAGER, 48.0, False, ""),
    ),
    "tensorrt",
    "the fastest that passes parity",
)
CACHE_FILE = "caches/rank1/rtx.cache"


def make_plan_of(model: Path, tp_sizes: tuple[int, ...] = (2, 1)) -> DecoderPlan:
    spec = ModelSpec.open(model)
    return make_plan(
        spec.layout,
        spec.checkpoint,
        Topology.of(tp_sizes),
        architecture=spec.config.architecture,
        dtype="bfloat16",
        limits=Limits(max_model_len=32, max_num_seqs=2, max_num_batched_tokens=16),
    )


def make_manifest(model: Path, plan: DecoderPlan, **changes: Any) -> Manifest:
    """Before it is published: without files."""
    parts: dict[str, Any] = {
        "plan": json.loads(json.dumps(plan.to_dict())),
        "plan_digest": plan.digest(),
        "config": {"version": 1, "model": {"dtype": "bfloat16"}},
        "source": read_source(model.glob("*.safetensors")),
        "host": Host.current("cpu"),
        "artefacts": ARTEFACTS,
        "uses": (USES,) * len(plan.ranks),
        "choices": (CHOICE,),
        "parity": {"passed": True, "min_cosine": 0.9997},
        "files": {},
    }
    return Manifest(**parts | changes)


def write_artefact(builder: BundleBuilder, key: str) -> None:
    with builder.artefact(key) as folder:
        for name, contents in FILES[key].items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(contents)


def write_rank(builder: BundleBuilder, model: Path, plan: DecoderPlan, rank: int) -> None:
    spec, cpu = ModelSpec.open(model), torch.device("cpu")
    tensors = stream(spec.checkpoint, plan.ranks[rank], dtype=torch.bfloat16, device=cpu)
    builder.write_weights(rank, tensors, source=source_of(model))


def source_of(model: Path) -> str:
    return source_digest(read_source(model.glob("*.safetensors")))


def fill(builder: BundleBuilder, model: Path, plan: DecoderPlan, scratch: Path) -> None:
    """Write whatever is not finished yet."""
    for key in FILES:
        if not builder.finished_artefact(key):
            write_artefact(builder, key)
    for rank in plan.ranks:
        if not builder.finished_weights(rank.rank, source_of(model)):
            write_rank(builder, model, plan, rank.rank)
    builder.copy_model_files(model, ["config.json", "generation_config.json"])
    scratch.mkdir(exist_ok=True)
    (scratch / "rtx.cache").write_bytes(b"cache" * 40)
    builder.copy_caches(1, scratch)


def build_bundle(
    out: Path,
    model: Path,
    *,
    tp_sizes: tuple[int, ...] = (2, 1),
    report: Any = None,
    **options: Any,
) -> Path:
    plan = make_plan_of(model, tp_sizes)
    with BundleBuilder.lead(out, plan, **options) as builder:
        fill(builder, model, plan, out.with_name("scratch"))
        builder.publish(make_manifest(model, plan), report=report or {"build_s": 1.5})
    return out


def rewrite_manifest(bundle: Path, change: Any) -> None:
    """Edit the manifest as one who knows about its own hash would: `change` edits the values."""
    file = bundle / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    del values["self"]
    text = json.dumps(values, sort_keys=True, indent=1) + "\n"
    values["self"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(values, sort_keys=True, indent=1) + "\n")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip(file: Path, offset: int) -> None:
    """Change one bit; a negative offset counts from the end."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
