"""Exported programs in .pt2 files, read without unpickling anything but tensors.

`torch.export.load` unpickles example inputs, some tensors and custom objects, and tries again
without restrictions where the restricted unpickler refuses. This reads the same files: the graph
from JSON, tensors mapped from the file, example inputs not at all. Not here: what the JSON may say.
"""

import io
import json
import logging
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._export.serde import schema
from torch._export.serde.serialize import (
    ExportedProgramDeserializer,
    _dict_to_dataclass,
    deserialize_scalar_type,
    serialize,
)
from torch.export.pt2_archive import _package as package
from torch.export.pt2_archive import constants as names

from parallel.errors import IntegrityError
from runner.sources.pt2_archive import Pt2Archive
from runner.sources.pt2_rules import RuleError, check_names, check_program

_LOG = logging.getLogger(__name__)
_MODEL = "model"
_Described = TypeVar("_Described")


def open_pt2(path: Path) -> nn.Module:
    """The program as a module, in eval mode, that checks its inputs' shapes no further.

    Raises:
        IntegrityError: see `read_program`.
    """
    module = read_program(path).module(check_guards=False)
    for part in module.modules():
        part.training = False  # `eval()` is refused by a module that was exported.
    _replace_detach(module)
    return module.requires_grad_(False)


def _replace_detach(module: torch.fx.GraphModule) -> None:
    """Constants of an export are detached in place, which a second export of the module refuses."""
    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten.detach_.default):
        node.target = aten.detach.default
    module.recompile()


def read_program(path: Path) -> torch.export.ExportedProgram:
    """The program of a .pt2 file, its tensors on the CPU, without example inputs.

    Raises:
        IntegrityError: absent, truncated, no .pt2 of this torch's layout, a member that only an
            unrestricted unpickler reads, or a graph that could run more than operators.
    """
    archive = Pt2Archive(path)
    model = _model_name(archive)
    file = names.MODELS_FILENAME_FORMAT.format(model)
    program = _read_json(archive, file, check_program)
    try:
        parsed = _parse(schema.ExportedProgram, program)
        return ExportedProgramDeserializer().deserialize(
            parsed, _read_state(archive, model), _read_constants(archive, model)
        )
    except IntegrityError:
        raise
    except Exception as error:
        found = str(error).strip().splitlines() or [""]
        raise archive.fault(
            file,
            f"torch {torch.__version__} cannot make a program of it ({type(error).__name__}: "
            f"{found[0]}); it was saved by torch {program.get('torch_version', 'unknown')}",
        ) from error


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a .pt2 that `read_program` and `torch.export.load` take, the same bytes every time.

    No member is pickled: example inputs are left out, and so is what tells where in which source
    file a node came from.

    Raises:
        IntegrityError: a weight or constant that is no plain tensor.
    """
    _check_plain(program, path)
    artifact = serialize(
        program,
        serialize_state_dict=False,
        serialize_constants=False,
        serialize_example_inputs=False,
    )
    text = json.loads(artifact.exported_program)
    try:
        check_program(text)
    except RuleError as error:
        raise IntegrityError(f"{path}: the program cannot be written: {error}") from None
    with path.open("wb") as file, package.PT2ArchiveWriter(file) as writer:
        for pack, config_name in (
            (package._package_state_dict, names.WEIGHTS_CONFIG_FILENAME_FORMAT),
            (package._package_constants, names.CONSTANTS_CONFIG_FILENAME_FORMAT),
        ):
            package._package_payload_config(
                writer, pack(_MODEL, program, writer), config_name.format(_MODEL)
            )
        writer.write_string(names.MODELS_FILENAME_FORMAT.format(_MODEL), json.dumps(text))
        writer.write_bytes(names.SAMPLE_INPUTS_FILENAME_FORMAT.format(_MODEL), b"")


def _check_plain(program: torch.export.ExportedProgram, path: Path) -> None:
    for name, value in {**program.state_dict, **program.constants}.items():
        if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise IntegrityError(
                f"{path}: {name} is a {type(value).__name__}, which only a pickle could hold; "
                "export the model with plain tensors"
            )


def _model_name(archive: Pt2Archive) -> str:
    """ "model", or the only one there is."""
    prefix, suffix = names.MODELS_FILENAME_FORMAT.split("{}")
    found = [
        name[len(prefix) : -len(suffix)]
        for name in archive.names()
        if name.startswith(prefix) and name.endswith(suffix)
    ]
    if _MODEL in found or len(found) == 1:
        return _MODEL if _MODEL in found else found[0]
    held = f"programs {', '.join(sorted(found))}" if found else "no exported program"
    raise IntegrityError(f"{archive.path}: holds {held}; save one with torch.export.save")


def _read_json(archive: Pt2Archive, name: str, check: Callable[[Any], None]) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(name))
        check(content)
    except RuleError as error:
        raise archive.fault(name, f"{error}; it is refused") from None
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise archive.fault(name, f"no description that an export writes ({error})") from None
    return content  # type: ignore[no-any-return]  # the check has shown that it is an object


def _parse(kind: type[_Described], content: dict[str, Any]) -> _Described:
    return _dict_to_dataclass(kind, content)  # type: ignore[no-untyped-call, no-any-return]


def _read_state(archive: Pt2Archive, model: str) -> dict[str, torch.Tensor]:
    return _read_payload(
        archive,
        names.WEIGHTS_DIR,
        names.WEIGHTS_CONFIG_FILENAME_FORMAT.format(model),
        legacy=f"{names.WEIGHTS_DIR}{model}.pt",
    )


def _read_constants(archive: Pt2Archive, model: str) -> dict[str, torch.Tensor]:
    return _read_payload(
        archive,
        names.CONSTANTS_DIR,
        names.CONSTANTS_CONFIG_FILENAME_FORMAT.format(model),
        legacy=f"{names.CONSTANTS_DIR}{model}.pt",
    )


def _read_payload(
    archive: Pt2Archive, folder: str, config_name: str, *, legacy: str
) -> dict[str, torch.Tensor]:
    """Tensors by name; two that share memory in the file share it here."""
    if legacy in archive.names():
        return _read_legacy(archive, legacy)
    config = _read_json(archive, config_name, check_names)
    mapped: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in _parse(schema.PayloadConfig, config).config.items():
        member = f"{folder}{entry.path_name}"
        if entry.tensor_meta is None:
            raise archive.fault(
                member,
                f"{name} is no tensor; only an unrestricted unpickler could read it, and that can "
                "run code, so it is refused; export the model without custom objects",
            )
        if entry.use_pickle:
            tensor = _unpickle(archive, member)
        else:
            if member not in mapped:
                mapped[member] = archive.map(member)
            tensor = _as_tensor(archive, member, mapped[member], entry.tensor_meta)
        tensors[name] = nn.Parameter(tensor, requires_grad=False) if entry.is_param else tensor
    return tensors


def _as_tensor(
    archive: Pt2Archive, member: str, raw: torch.Tensor, meta: schema.TensorMeta
) -> torch.Tensor:
    """Args: raw: (num_bytes,), uint8."""
    dtype = deserialize_scalar_type(meta.dtype)
    sizes, strides = _integers(meta.sizes), _integers(meta.strides)
    offset = meta.storage_offset.as_int
    values = min([*sizes, *strides, offset]) >= 0 and len(sizes) == len(strides)
    count = raw.numel() // dtype.itemsize
    last = sum((size - 1) * step for size, step in zip(sizes, strides, strict=False))
    if not values or (0 not in sizes and offset + last >= count):
        raise archive.fault(
            member, f"has {raw.numel()} bytes, too few for a tensor of shape {sizes}, {dtype}"
        )
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    if raw.data_ptr() % dtype.itemsize:
        _LOG.warning("%s: member %s is not aligned; it is copied", archive.path, member)
        raw = raw.clone()
    usable = raw[: count * dtype.itemsize].view(dtype)
    return usable.as_strided(sizes, strides, offset)


def _integers(values: list[schema.SymInt]) -> list[int]:
    return [value.as_int for value in values]


def _unpickle(archive: Pt2Archive, member: str) -> torch.Tensor:
    tensor = _load(archive, member)
    if not isinstance(tensor, torch.Tensor):
        raise archive.fault(member, f"holds a {type(tensor).__name__}, not a tensor")
    return tensor


def _read_legacy(archive: Pt2Archive, member: str) -> dict[str, torch.Tensor]:
    tensors = _load(archive, member)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise archive.fault(member, "holds no tensors by name")
    return dict(tensors)


def _load(archive: Pt2Archive, member: str) -> object:
    try:
        return torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise archive.fault(
            member,
            "it holds more than tensors; only an unrestricted unpickler could read it, and that "
            "can run code, so it is refused; export the model with plain tensors",
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, struct.error) as error:
        raise archive.fault(member, f"truncated or corrupt ({error})") from None
