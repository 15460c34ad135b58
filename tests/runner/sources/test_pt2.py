"""Exported programs: what is read equals what was saved, and nothing in a file gets to run."""

import contextlib
import io
import json
import logging
import zipfile

import pytest
import torch
from torch import nn

from parallel.errors import IntegrityError
from runner.sources.pt2 import open_pt2, read_program, write_program


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.linear.weight
        self.register_buffer("scale", torch.arange(4.0), persistent=False)
        self.register_buffer("shift", torch.ones(2, 4)[1])
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, *, mask):
        y = self.norm(self.linear(x) * self.scale + self.shift)
        return {"y": y, "pair": (y * mask, [self.tied(x) + torch.tensor([1.0, 2, 3, 4])])}


X, MASK = torch.randn(2, 3), torch.randn(2, 4)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(torch.export.export(net, (X,), {"mask": MASK}, strict=False), path)
    return path


def rewritten(path, to, changes):
    """A copy with members replaced or added (bytes), changed (a function) or left out (None)."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        root = source.namelist()[0].split("/")[0]
        content = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
        for name, change in changes.items():
            content[name] = change(content[name]) if callable(change) else change
        for name, data in content.items():
            if data is not None:
                target.writestr(f"{root}/{name}", data)
    return to


def edited(edit):
    """A change of a JSON member."""

    def change(data):
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return change


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def assert_same(module, net):
    found, expected = module(X, mask=MASK), net(X, mask=MASK)
    assert list(found) == ["y", "pair"]
    assert isinstance(found["pair"], tuple)
    assert isinstance(found["pair"][1], list)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_saved_program_computes_the_same_and_its_tensors_are_mapped(saved, net):
    module = open_pt2(saved)
    assert_same(module, net)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    with open("/proc/self/maps") as maps:
        assert str(saved) in maps.read()
    assert_same(torch.export.export(module, (X,), {"mask": MASK}, strict=False).module(), net)


def test_a_written_program_is_small_reproducible_and_read_by_torch_too(saved, net, tmp_path):
    program = read_program(saved)
    for name in ("one.pt2", "two.pt2"):
        write_program(program, tmp_path / name)
    content = (tmp_path / "one.pt2").read_bytes()
    assert content == (tmp_path / "two.pt2").read_bytes()
    assert len(content) < saved.stat().st_size
    assert __file__.encode() not in content
    assert_same(open_pt2(tmp_path / "one.pt2"), net)
    assert_same(torch.export.load(tmp_path / "one.pt2").module(), net)
    with zipfile.ZipFile(tmp_path / "one.pt2") as archive:
        stored = {name: archive.read(name) for name in archive.namelist()}
    assert not [name for name, data in stored.items() if data.startswith((b"PK", b"\x80"))]


def test_a_graph_with_weights_as_inputs_comes_back(tmp_path):
    class Function(nn.Module):
        def forward(self, weight, x):
            return torch.nn.functional.linear(x, weight).relu()

    weight = torch.randn(4, 3)
    program = torch.export.export(Function(), (weight, X), strict=False)
    write_program(program, tmp_path / "graph.pt2")
    module = open_pt2(tmp_path / "graph.pt2")
    assert not module.state_dict()
    torch.testing.assert_close(module(weight, X), Function()(weight, X), rtol=0, atol=0)


def test_symbolic_sizes_are_read(tmp_path):
    class Dynamic(nn.Module):
        def forward(self, x):
            flat = x.reshape(x.shape[0] * x.shape[1], -1)
            return flat[: (x.shape[0] + 3) // 2].sum(0), torch.cat([x, x])

    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    x = torch.randn(4, 6, 2)
    program = torch.export.export(Dynamic(), (x,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "d.pt2")
    other = torch.randn(9, 5, 2)
    torch.testing.assert_close(open_pt2(tmp_path / "d.pt2")(other), Dynamic()(other))


def test_operators_of_every_spelling_are_read(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            inside = (x > -1) & (x < 1) | (x == 2) ^ (x == 3)
            with torch.no_grad():
                y = torch.softmax(x, -1)
            return torch.where(inside, y, 0), (inside.long() << 1) >> 1, x.sort()[1]

    torch.export.save(torch.export.export(Masked(), (X,), strict=False), tmp_path / "m.pt2")
    torch.testing.assert_close(open_pt2(tmp_path / "m.pt2")(X), Masked()(X), rtol=0, atol=0)


class Trap:
    """Unpickled without restrictions, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


WEIGHTS, CONSTANTS = "data/weights/", "data/constants/"


def as_pickle(config):
    for entry in config["config"].values():
        entry["use_pickle"] = True


def as_object(prefix):
    def edit(config):
        for entry in config["config"].values():
            entry |= {"use_pickle": True, "tensor_meta": None, "path_name": f"{prefix}0"}

    return edit


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("weight", r"weight_0: it holds more than tensors.*refused"),
        ("constant", r"tensor_0: it holds more than tensors.*refused"),
        ("legacy weights", r"weights/model\.pt: it holds more than tensors"),
        ("legacy constants", r"constants/model\.pt: it holds more than tensors"),
        ("custom object", r"custom_obj_0: .* is no tensor.*refused"),
        ("opaque object", r"opaque_obj_0: .* is no tensor.*refused"),
        ("old layout", r"saved by torch before 2\.8"),
        ("sample inputs", None),
    ],
)
def test_a_planted_pickle_never_runs(saved, net, tmp_path, case, message):
    marker = tmp_path / "ran"
    trap = pickled({"x": Trap(marker)})
    weights = {f"{WEIGHTS}weight_{i}": trap for i in range(2)}
    constants = {f"{CONSTANTS}tensor_{i}": trap for i in range(2)}
    config = f"{CONSTANTS}model_constants_config.json"
    changes = {
        "weight": {f"{WEIGHTS}model_weights_config.json": edited(as_pickle), **weights},
        "constant": {config: edited(as_pickle), **constants},
        "legacy weights": {f"{WEIGHTS}model.pt": trap},
        "legacy constants": {f"{CONSTANTS}model.pt": trap},
        "custom object": {
            config: edited(as_object("custom_obj_")),
            f"{CONSTANTS}custom_obj_0": trap,
        },
        "opaque object": {
            config: edited(as_object("opaque_obj_")),
            f"{CONSTANTS}opaque_obj_0": trap,
        },
        "sample inputs": {"data/sample_inputs/model.pt": trap},
    }
    planted = tmp_path / "planted.pt2"
    if case == "old layout":
        with zipfile.ZipFile(planted, "w") as archive:
            archive.writestr("version", "8.20")
            for name in ("state_dict", "constants", "example_inputs"):
                archive.writestr(f"serialized_{name}.pt", trap)
            archive.writestr("serialized_exported_program.json", "{}")
    else:
        rewritten(saved, planted, changes[case])
    if message is None:
        assert_same(open_pt2(planted), net)
    else:
        with pytest.raises(IntegrityError, match=message):
            open_pt2(planted)
    assert not marker.exists()


def test_the_trap_itself_works(saved, tmp_path, monkeypatch):
    """Torch's own reader runs it, or the test above would show nothing."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Its warning is malformed.
    trap = pickled({"x": Trap(tmp_path / "ran")})
    planted = rewritten(saved, tmp_path / "p.pt2", {"data/sample_inputs/model.pt": trap})
    with contextlib.suppress(TypeError):  # What comes of the trap is no input.
        torch.export.load(planted)
    assert (tmp_path / "ran").exists()


def set_first_size(expression):
    def edit(program):
        values = program["graph_module"]["graph"]["tensor_values"]
        sizes = {"expr_str": expression, "hint": {"as_int": 2}}
        values["x"]["sizes"][0] = {"as_expr": sizes}

    return edit


def set_node(**fields):
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0] |= fields

    return edit


def set_tree(tree):
    def edit(program):
        program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = tree

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        set_first_size("__import__('pathlib').Path('MARKER').touch()"),
        set_first_size(["__import__('pathlib').Path('MARKER').touch()"]),
        set_first_size("s0.__class__"),
        set_node(target="torch.os.system"),
        set_node(target="torch.ops.load_library"),
        set_node(target="torch.ops.aten.from_file.default"),
        set_node(target="torch.load"),
        set_node(target="_operator.__loader__"),
        set_node(target="_operator.call"),
        set_node(target="_operator.methodcaller"),
        set_node(target="_operator.attrgetter"),
        set_node(name="x; open('MARKER', 'w')  #"),
        set_tree('[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'),
    ],
)
def test_a_graph_that_would_run_code_is_refused(saved, tmp_path, edit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted = rewritten(saved, tmp_path / "p.pt2", {"models/model.json": edited(edit)})
    with pytest.raises(IntegrityError, match=r"models/model\.json: .*refused"):
        open_pt2(planted)
    assert not (tmp_path / "MARKER").exists()


def test_truncated_and_foreign_files_are_refused(saved, tmp_path):
    content = saved.read_bytes()
    broken = tmp_path / "b.pt2"
    for length in (0, 10, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:length])
        with pytest.raises(IntegrityError, match="truncated"):
            read_program(broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("root/readme.txt", "hello")
    with pytest.raises(IntegrityError, match="no exported program"):
        read_program(broken)
    with pytest.raises(IntegrityError, match="no such file"):
        read_program(tmp_path / "absent.pt2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{WEIGHTS}weight_0": b"abc"}, "too few for a tensor"),
        ({f"{WEIGHTS}weight_0": None}, "weight_0: absent"),
        ({"models/model.json": b"{"}, "no description that an export writes"),
        ({"models/model.json": b"{}"}, "cannot make a program"),
        ({f"{WEIGHTS}model_weights_config.json": None}, "weights_config.json: absent"),
    ],
)
def test_damaged_members_are_named(saved, tmp_path, changes, message):
    with pytest.raises(IntegrityError, match=message):
        read_program(rewritten(saved, tmp_path / "p.pt2", changes))
