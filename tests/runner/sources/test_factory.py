"""Modules by factory: what may be imported, where they are built, and how weights must fit."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from parallel.errors import ConfigError, IntegrityError
from runner.sources.factory import code_file, open_factory

SOURCE = """
from functools import partial
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_suffix(".imported").touch()


class Net(nn.Module):
    devices = []

    def __init__(self, width=3, kind="plain"):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        if kind == "tied":
            self.second = nn.Linear(width, width)
            self.second.weight = self.first.weight
        if kind == "buffer":
            self.register_buffer("scale", torch.arange(1.0, width + 1), persistent=False)
        if kind == "attribute":
            self.scale = torch.arange(1.0, width + 1)
        if kind == "closure":
            kept = torch.arange(1.0, width + 1)
            self.get_scale = lambda: kept
        if kind == "number":
            self.rate = [x.item() for x in torch.linspace(1.0, 2.0, 2)][1]
        Net.devices.append(self.first.weight.device.type)

    def forward(self, x):
        scale = self.get_scale() if hasattr(self, "get_scale") else getattr(self, "scale", 1.0)
        y = self.norm(self.first(x)) * scale * getattr(self, "rate", 1.0)
        return self.second(y) if hasattr(self, "second") else y


def make(**arguments):
    return Net(**arguments)


def make_number():
    return 3


small = partial(Net, width=2)
"""


@pytest.fixture
def package(tmp_path, request):
    name = f"factory_{abs(hash(request.node.name))}"
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / f"{name}.py").write_text(SOURCE)
    yield folder, name
    sys.modules.pop(name, None)


def open_net(package, *, weights=None, function="make", **arguments):
    folder, name = package
    reference = f"{name}:{function}"
    return open_factory(
        reference, arguments=arguments, weights=weights, allowed=[reference], search_path=folder
    )


def saved(module, path, **changes):
    state = {n: t.clone() for n, t in module.state_dict().items()} | changes
    save_file({n: t for n, t in state.items() if t is not None}, path)
    return path


def test_a_factory_that_is_not_listed_is_not_imported(package):
    folder, name = package
    with pytest.raises(ConfigError, match=r"security\.factories lists other:make"):
        open_factory(
            f"{name}:make", arguments={}, weights=None, allowed=["other:make"], search_path=folder
        )
    assert not (folder / f"{name}.imported").exists()
    open_net(package)
    assert (folder / f"{name}.imported").exists()


@pytest.mark.parametrize("reference", ["make", "a.b", "a/b:c", "a:b()", ":a", "a:"])
def test_what_is_no_reference_is_refused(reference):
    with pytest.raises(ConfigError, match=r"write package\.module:function"):
        open_factory(reference, arguments={}, weights=None, allowed=[reference], search_path=None)


def test_the_file_of_the_code_is_known(package):
    folder, name = package
    open_net(package)
    for function in ("make", "Net", "small"):
        assert code_file(f"{name}:{function}") == folder / f"{name}.py"


def test_search_path_is_gone_afterwards_and_the_module_is_in_eval_mode(package):
    before = list(sys.path)
    module = open_net(package, width=5)
    assert sys.path == before
    assert not any(part.training for part in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert module.first.in_features == 5


def test_errors_of_the_user_s_code_name_the_factory(package):
    with pytest.raises(ConfigError, match=r"TypeError.*it was given depth=3"):
        open_net(package, depth=3)
    with pytest.raises(ConfigError, match=r"returned a int; an nn\.Module is wanted"):
        open_net(package, function="make_number")
    with pytest.raises(ConfigError, match=r"cannot be imported.*has no attribute 'absent'"):
        open_net(package, function="absent")
    folder, _ = package
    with pytest.raises(ConfigError, match="No module named 'absent_package'"):
        open_factory(
            "absent_package:f",
            arguments={},
            weights=None,
            allowed=["absent_package:f"],
            search_path=folder,
        )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "nested.pth"])
def test_weights_are_loaded_on_a_module_that_was_built_without_memory(package, tmp_path, suffix):
    torch.manual_seed(1)
    source = open_net(package).eval()
    state = source.state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "nested" in suffix else state, path)
    torch.manual_seed(2)
    module = open_net(package, weights=path)
    assert type(module).devices == ["cpu", "meta"]
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "closure", "number"])
def test_values_that_the_factory_computes_are_kept(package, tmp_path, kind):
    source = open_net(package, kind=kind)
    module = open_net(package, kind=kind, weights=saved(source, tmp_path / "w.safetensors"))
    assert type(module).devices[-1] == "cpu"
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), source(x), rtol=0, atol=0)


def test_a_tied_parameter_stays_one_and_may_be_stored_once(package, tmp_path):
    source = open_net(package, kind="tied")
    path = saved(source, tmp_path / "w.safetensors", **{"first.weight": None})
    module = open_net(package, kind="tied", weights=path)
    assert module.first.weight is module.second.weight
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), source(x), rtol=0, atol=0)


def test_dtypes_stay_as_stored_and_tensors_are_those_of_the_file(package, tmp_path):
    source = open_net(package)
    path = saved(
        source, tmp_path / "w.safetensors", **{"first.weight": source.first.weight.bfloat16()}
    )
    module = open_net(package, weights=path)
    assert module.first.weight.dtype == torch.bfloat16
    assert module.first.bias.dtype == torch.float32
    # Mapped: the file's name stands in the process's memory map.
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()


def test_a_state_dict_that_does_not_fit_names_the_tensor_and_its_nearest(package, tmp_path):
    source, path = open_net(package), tmp_path / "w.safetensors"
    renamed = {"first.weight": None, "frist.weight": source.first.weight}
    cases = [
        (renamed, r"first\.weight is missing; the nearest name that the file has is frist\.weight"),
        ({"first.wait": torch.zeros(1)}, r"no tensor first\.wait; .* is first\.weight"),
        ({"first.bias": torch.zeros(4)}, r"first\.bias has shape \[4\], the model wants \[3\]"),
        ({"first.bias": torch.zeros(3).int()}, r"first\.bias is int32, .* floating point"),
    ]
    for changes, message in cases:
        with pytest.raises(IntegrityError, match=message):
            open_net(package, weights=saved(source, path, **changes))


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(package, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    for old_format in (False, True):
        torch.save({"a": Trap(marker)}, path, _use_new_zipfile_serialization=not old_format)
        with pytest.raises(IntegrityError, match=r"so it is refused.*safetensors"):
            open_net(package, weights=path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(IntegrityError, match=r"so it is refused.*safetensors"):
        open_net(package, weights=path)
    assert not marker.exists()


def test_files_that_are_no_weights_are_refused(package, tmp_path):
    path = tmp_path / "w.pt"
    with pytest.raises(IntegrityError, match="no such file"):
        open_net(package, weights=path)
    with pytest.raises(ConfigError, match=r"a \.safetensors, \.pt or \.pth file"):
        open_net(package, weights=tmp_path / "w.bin")
    torch.save({"epoch": 3}, path)
    with pytest.raises(IntegrityError, match="holds no state dict"):
        open_net(package, weights=path)
    torch.save(open_net(package).state_dict(), path)
    for length in (0, 3, 100, path.stat().st_size - 40):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(path.read_bytes()[:length])
        with pytest.raises(IntegrityError):
            open_net(package, weights=cut)
