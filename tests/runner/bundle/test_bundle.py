"""A bundle that is as it was made opens and verifies; of any other, an error says what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from bundles import CACHE_FILE, ENGINE, FILES, LIBRARY, build_bundle, flip, rewrite_manifest
from processes import ROOT

from parallel.errors import IncompatibleError, IntegrityError, ShardlineError
from parallel.weights import stream
from runner.bundle.bundle import Bundle
from runner.bundle.files import hash_file
from runner.bundle.host import Host
from runner.models.spec import ModelSpec

CPU = torch.device("cpu")
ENGINE_FILE = f"artefacts/{ENGINE}/engine.trt"
WEIGHTS_FILE = "weights/rank1.safetensors"

OPEN_AS_ANOTHER = """
import os, sys
from pathlib import Path
from runner.bundle.bundle import Bundle
if not os.getuid():
    os.setuid(65534)
Bundle.open(Path(sys.argv[1]))
"""


def use(bundle: Path) -> None:
    """Read everything that a run would read."""
    opened = Bundle.open(bundle)
    assert opened.model_folder.is_dir()
    for rank in opened.plan.ranks:
        for _ in opened.weights(rank.rank, device=CPU):
            pass
        opened.caches(rank.rank)
    for key in opened.manifest.artefacts:
        opened.artefact(key)


def refused(action: Callable[[], object], bundle: Path) -> ShardlineError:
    """The error names the bundle and the command that mends it."""
    with pytest.raises((IntegrityError, IncompatibleError)) as caught:
        action()
    message = str(caught.value)
    assert str(bundle) in message
    assert message.endswith(f"shardline compile --config PLAN.YAML --output {bundle} --overwrite")
    assert "\n" not in message
    return caught.value


def test_a_bundle_gives_what_was_put_in(bundle: Path, model: Path) -> None:
    opened = Bundle.open(bundle)
    opened.verify()
    assert opened.faults() == []
    assert (opened.model_folder / "config.json").read_bytes() == (
        model / "config.json"
    ).read_bytes()
    for key, files in FILES.items():
        folder = opened.artefact(key)
        assert {n: (folder / n).read_bytes() for n in files} == files
    caches = opened.caches(1)
    assert caches is not None
    assert (caches / "rtx.cache").read_bytes() == b"cache" * 40
    assert opened.caches(0) is None


def test_a_rank_reads_its_own_weights(bundle: Path, model: Path) -> None:
    opened = Bundle.open(bundle)
    checkpoint = ModelSpec.open(model).checkpoint
    for rank in opened.plan.ranks:
        wanted = dict(stream(checkpoint, rank, dtype=torch.bfloat16, device=CPU))
        found = dict(opened.weights(rank.rank, device=CPU))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "name", [".", "manifest.json", "weights", WEIGHTS_FILE, f"artefacts/{ENGINE}"]
)
def test_what_another_user_may_not_read_is_named_with_what_to_do(name: str, bundle: Path) -> None:
    """As another user, if these are root's tests: nobody keeps root from reading."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        moved = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
        hidden = moved / name
        hidden.chmod(0o600 if hidden.is_file() else 0o700)
        if os.geteuid():
            hidden.chmod(0)
        command = [sys.executable, "-c", OPEN_AS_ANOTHER, str(moved)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        hidden.chmod(0o755)
    assert "PreflightError" in done.stderr
    said = done.stderr.splitlines()[-1]
    assert f"{moved / name}".removesuffix("/.") in said
    assert f"chmod -R a+rX {moved}" in said


def test_a_bundle_may_be_moved_and_be_read_only(bundle: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "moved")
    for path in [moved, *moved.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    use(moved)
    for path in [moved, *moved.rglob("*")]:
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("model/config.json", 20),
        ("model/generation_config.json", -2),
        (WEIGHTS_FILE, -1),
        (WEIGHTS_FILE, -20_000),
        (ENGINE_FILE, 0),
        (f"artefacts/{LIBRARY}/model.so", 700),
        (f"artefacts/{LIBRARY}/kernels/a.cubin", -1),
        (CACHE_FILE, 3),
    ],
)
def test_a_flipped_bit_is_found_before_the_file_is_used(
    name: str, offset: int, bundle: Path
) -> None:
    flip(bundle / name, offset)
    error = refused(lambda: use(bundle), bundle)
    assert error.exit_code == 4
    assert f"{name}: sha256 of bytes 0 to " in str(error)
    assert "the manifest says " in str(error)
    opened = Bundle.open(bundle)
    assert [fault.file for fault in opened.faults()] == [name]
    refused(opened.verify, bundle)


def test_every_bit_of_a_header_of_weights_counts(bundle: Path) -> None:
    file = bundle / WEIGHTS_FILE
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for offset in [*range(8), *range(8, header, 41), header - 1]:
        file.write_bytes(data)
        flip(file, offset)
        assert refused(lambda: use(bundle), bundle).exit_code in (4, 5)


def test_other_parts_can_be_used_beside_a_spoilt_one(bundle: Path) -> None:
    flip(bundle / ENGINE_FILE, 0)
    opened = Bundle.open(bundle)
    assert opened.artefact(LIBRARY).is_dir()
    refused(lambda: opened.artefact(ENGINE), bundle)
    refused(lambda: opened.artefact(ENGINE), bundle)


def test_an_artefact_is_hashed_once(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.artefact(ENGINE)
    flip(bundle / ENGINE_FILE, 0)
    opened.artefact(ENGINE)  # it is in use by now; reading it again would say nothing
    refused(lambda: Bundle.open(bundle).artefact(ENGINE), bundle)


@pytest.mark.parametrize("name", ["model/config.json", WEIGHTS_FILE, ENGINE_FILE, CACHE_FILE])
def test_a_missing_file_is_found_at_once(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 4
    assert f"{name}: it is absent" in str(error)


@pytest.mark.parametrize("name", ["model/config.json", WEIGHTS_FILE, ENGINE_FILE, CACHE_FILE])
@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_found_at_once(name: str, change: int, bundle: Path) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size + change)
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 4
    assert f"{name}: it has {size + change} bytes, the manifest says {size}" in str(error)


def test_several_faults_are_counted(bundle: Path) -> None:
    for name in ("model/config.json", ENGINE_FILE, CACHE_FILE):
        (bundle / name).unlink()
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert f"{ENGINE_FILE}: it is absent (and 2 more)" in str(error)


@pytest.mark.parametrize(
    "name",
    ["model/chat_template.jinja", f"artefacts/{LIBRARY}/evil.so", "weights/rank9.safetensors"],
)
def test_a_file_too_many_is_refused(name: str, bundle: Path) -> None:
    (bundle / name).write_text("x")
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 4
    assert f"{name}: the manifest knows no such file" in str(error)


def test_a_file_that_comes_after_the_opening_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "artefacts" / LIBRARY / "evil.so").write_text("x")
    assert "evil.so" in str(refused(lambda: opened.artefact(LIBRARY), bundle))


def test_files_beside_the_contents_do_not_matter(bundle: Path) -> None:
    (bundle / "NOTES.md").write_text("ours")
    (bundle / "report.json").unlink()
    use(bundle)


def test_a_link_that_leads_out_is_refused(bundle: Path, tmp_path: Path) -> None:
    engine = bundle / ENGINE_FILE
    shutil.move(engine, tmp_path / "engine.trt")
    engine.symlink_to(tmp_path / "engine.trt")
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert f"{ENGINE_FILE}: it is a link that leads out of the bundle" in str(error)


def test_a_name_that_leads_out_is_refused_though_it_begins_well(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_text("x")

    def smuggle(values: dict[str, dict[str, object]]) -> None:
        entry = values["files"].pop("model/config.json")
        values["files"]["model/../../outside"] = entry

    rewrite_manifest(bundle, smuggle)
    (bundle / "model/config.json").unlink()
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert "model/../../outside: it is no plain path inside the bundle" in str(error)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2)])
def test_swapped_files_of_two_ranks_are_known_by_what_they_say(
    first: int, second: int, bundle: Path
) -> None:
    paths = [bundle / f"weights/rank{rank}.safetensors" for rank in (first, second)]
    contents = [path.read_bytes() for path in paths]
    for path, data in zip(paths, reversed(contents), strict=True):
        path.write_bytes(data)
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 5
    assert f"rank{first}.safetensors holds the weights of rank {second}, plan" in str(error)
    assert f"they must be of rank {first}, plan" in str(error)


def test_swapped_files_are_known_though_the_manifest_was_swapped_too(bundle: Path) -> None:
    names = ["weights/rank0.safetensors", "weights/rank1.safetensors"]
    contents = [(bundle / name).read_bytes() for name in names]
    for name, data in zip(names, reversed(contents), strict=True):
        (bundle / name).write_bytes(data)

    def swap(values: dict[str, dict[str, dict[str, object]]]) -> None:
        first, second = (values["files"][name] for name in names)
        for key in ("size", "sha256"):
            first[key], second[key] = second[key], first[key]

    rewrite_manifest(bundle, swap)
    assert refused(lambda: Bundle.open(bundle), bundle).exit_code == 5


def test_weights_of_another_plan_are_refused(
    bundle: Path, model: Path, tmp_path: Path, built: Path
) -> None:
    other = build_bundle(tmp_path / "other", model, tp_sizes=(3,))
    shutil.copy(other / "weights/rank0.safetensors", bundle / "weights/rank0.safetensors")
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 5
    plans = [Bundle.open(path).plan.digest()[:12] for path in (other, built)]
    assert f"of rank 0, plan {plans[0]}; they must be of rank 0, plan {plans[1]}" in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["plan"].update(max_model_len=33), "plan has the digest"),
        (lambda v: v.update(plan_digest="0" * 64), "plan_digest is 000"),
        (lambda v: v["plan"]["ranks"].pop(), "2 stages and 2 ranks"),
        (lambda v: v["uses"].pop(), "uses has 2 ranks, plan 3"),
        (
            lambda v: v["files"][WEIGHTS_FILE].update(place={"rank": 0, "stage": 0, "tp_rank": 0}),
            "has place Place(rank=0, stage=0, tp_rank=0), the plan says Place(rank=1, stage=0",
        ),
        (
            lambda v: v["files"].update({"weights/rank7.safetensors": v["files"][WEIGHTS_FILE]}),
            "which is of none of 3 ranks",
        ),
    ],
)
def test_a_manifest_and_plan_that_do_not_agree_are_refused(
    change: Callable[[object], object], message: str, bundle: Path
) -> None:
    rewrite_manifest(bundle, change)
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 4
    assert message in str(error)


def test_a_tensor_that_is_not_the_plan_s_is_refused_though_every_hash_is_right(
    bundle: Path,
) -> None:
    file = bundle / WEIGHTS_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    # One letter of a name, so that no offset moves.
    name = next(n for n in json.loads(data[8 : 8 + length]) if n.endswith("norm.weight"))
    file.write_bytes(data.replace(name.encode(), name.replace("norm", "nurm").encode(), 1))
    entry = asdict(hash_file(file))
    rewrite_manifest(bundle, lambda v: v["files"][WEIGHTS_FILE].update(entry))
    error = refused(lambda: Bundle.open(bundle), bundle)
    assert error.exit_code == 4
    assert f"{WEIGHTS_FILE} holds {name} with shape None, the plan says (48,)" in str(error)


def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    absent = tmp_path / "absent"
    for path, problem in [
        (empty, ": it has no manifest.json"),
        (model, " but a model's folder; give it as --model"),
        (file, ": it is no folder"),
        (absent, ": it is no folder"),
    ]:
        with pytest.raises(IntegrityError) as caught:
            Bundle.open(path)
        assert f"{path} is no bundle{problem}" in str(caught.value)
        # Never one of what is there: a bundle alone is replaced.
        assert str(caught.value).endswith("--output BUNDLE")


def test_a_rank_or_artefact_that_it_was_not_made_for_is_incompatible(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for action in (
        lambda: list(opened.weights(3, device=CPU)),
        lambda: opened.caches(-1),
        lambda: opened.artefact("0" * 64),
    ):
        assert refused(action, bundle).exit_code == 5


def test_another_host_is_incompatible(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    here = Host.current("cpu")
    opened.check_host(here)
    error = refused(lambda: opened.check_host(replace(here, cpu="riscv64 RVV")), bundle)
    assert error.exit_code == 5
    assert f"CPU is riscv64 RVV, it was built for {here.cpu}" in str(error)
