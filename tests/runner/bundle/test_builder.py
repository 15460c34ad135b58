"""A bundle is built aside and appears whole; what was finished before a kill is not made again."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import (
    ARTEFACTS,
    CACHE_FILE,
    EAGER,
    ENGINE,
    FILES,
    LIBRARY,
    build_bundle,
    fill,
    flip,
    make_manifest,
    make_plan_of,
    source_of,
    tree,
    write_artefact,
    write_rank,
)
from checkpoints import make_checkpoint
from processes import ROOT

from parallel.decoder_plan import DecoderPlan
from parallel.errors import (
    ConfigError,
    IncompatibleError,
    IntegrityError,
    InternalError,
    PreflightError,
)
from runner.bundle.builder import BundleBuilder
from runner.bundle.bundle import Bundle
from runner.bundle.manifest import Artefact


@pytest.fixture
def plan(model: Path) -> DecoderPlan:
    return make_plan_of(model)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def without_report(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "report.json"}


def names_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name))


def finish(builder: BundleBuilder, model: Path, plan: DecoderPlan, **changes: Any) -> None:
    fill(builder, model, plan, builder.out.with_name("scratch"))
    builder.publish(make_manifest(model, plan, **changes), report={})


def test_two_builds_of_the_same_are_the_same_but_for_the_report(
    built: Path, model: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "model")
    again = build_bundle(tmp_path / "again", moved, report={"build_s": 7.25})
    assert without_report(again) == without_report(built)
    assert tree(again)["report.json"] != tree(built)["report.json"]


def test_a_bundle_appears_when_it_is_whole(out: Path, model: Path, plan: DecoderPlan) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        fill(builder, model, plan, out.with_name("scratch"))
        assert not out.exists()
        assert names_beside(out) == ["out.lock", "out.partial"]
        builder.publish(make_manifest(model, plan), report={"build_s": 1})
        Bundle.open(out).verify()
    assert names_beside(out) == ["out"]
    assert {path.name for path in out.iterdir()} == {
        *("artefacts", "caches", "model", "weights"),
        *("manifest.json", "report.json"),
    }


def test_ranks_write_their_own_parts_at_once(
    out: Path, built: Path, model: Path, plan: DecoderPlan
) -> None:
    code = (
        "import sys; from pathlib import Path; import bundles\n"
        "from runner.bundle.builder import BundleBuilder\n"
        "out, model, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "plan = bundles.make_plan_of(model)\n"
        "builder = BundleBuilder(out, plan)\n"
        "bundles.write_rank(builder, model, plan, rank)\n"
        "for key in bundles.FILES: bundles.write_artefact(builder, key)\n"
    )
    with BundleBuilder.lead(out, plan) as builder:
        ranks = [start(code, out, model, str(rank.rank)) for rank in plan.ranks]
        assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
        assert all(builder.finished_artefact(key) for key in FILES)
        assert all(builder.finished_weights(r.rank, source_of(model)) for r in plan.ranks)
        finish(builder, model, plan)
    assert without_report(out) == without_report(built)


def start(code: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A process of python that can import the project and the tests' support."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['tests/support']\n{code}", *arguments],
        cwd=ROOT,
        text=True,
        **options,
    )


HALF_DONE = """
import time
from pathlib import Path
import bundles, torch
from runner.bundle.builder import BundleBuilder

out, model = Path(sys.argv[1]), Path(sys.argv[2])
plan = bundles.make_plan_of(model)

def stop():
    print("now", flush=True)
    time.sleep(600)

def half():
    yield plan.ranks[1].tensors[0].name, torch.zeros(plan.ranks[1].tensors[0].shape).bfloat16()
    stop()

with BundleBuilder.lead(out, plan) as builder:
    bundles.write_artefact(builder, bundles.ENGINE)
    bundles.write_rank(builder, model, plan, 0)
    builder.copy_model_files(model, ["config.json"])
    if sys.argv[3] == "weights":
        builder.write_weights(1, half(), source=bundles.source_of(model))
    with builder.artefact(bundles.LIBRARY) as folder:
        (folder / "model.so").write_bytes(b"half")
        stop()
"""


@pytest.mark.parametrize("where", ["artefact", "weights"])
def test_a_compile_that_was_killed_goes_on(
    where: str, out: Path, built: Path, model: Path, plan: DecoderPlan
) -> None:
    process = start(HALF_DONE, out, model, where, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert names_beside(out) == ["out.lock", "out.partial"]
    assert any(name.startswith("building/") for name in tree(out.with_name("out.partial")))
    for path in (out, out.with_name("out.partial")):
        with pytest.raises(
            IntegrityError, match=f"unfinished bundle; finish it: .*--output {out} "
        ):
            Bundle.open(path)

    with BundleBuilder.lead(out, plan) as builder:
        kept = [path for path in builder.folder.rglob("*") if path.is_file()]
        assert {path.relative_to(builder.folder).parts[0] for path in kept} == {
            *("artefacts", "finished", "weights")
        }
        engine = builder.artefact_folder(ENGINE) / "engine.trt"
        weights = builder.folder / "weights" / "rank0.safetensors"
        before = [path.stat().st_ino for path in (engine, weights)]
        assert [builder.finished_artefact(key) for key in (ENGINE, LIBRARY)] == [True, False]
        source = source_of(model)
        assert [builder.finished_weights(r, source) for r in range(3)] == [True, False, False]
        finish(builder, model, plan)
    after = [out / path.relative_to(builder.folder) for path in (engine, weights)]
    assert [path.stat().st_ino for path in after] == before
    assert without_report(out) == without_report(built)


def test_a_body_that_raises_leaves_nothing(out: Path, plan: DecoderPlan) -> None:
    def build(builder: BundleBuilder) -> None:
        with builder.artefact(ENGINE) as folder:
            (folder / "engine.trt").write_bytes(b"half")
            raise KeyError("an operator")

    with BundleBuilder.lead(out, plan) as builder:
        with pytest.raises(KeyError, match="an operator"):
            build(builder)
        assert not builder.finished_artefact(ENGINE)
        assert "engine.trt" not in str(tree(builder.folder))


def test_a_finished_part_that_was_changed_since_is_made_again(
    out: Path, built: Path, model: Path, plan: DecoderPlan, caplog: pytest.LogCaptureFixture
) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        fill(builder, model, plan, out.with_name("scratch"))
    flip(builder.artefact_folder(ENGINE) / "engine.trt", 5)
    (builder.artefact_folder(LIBRARY) / "more").write_text("x")
    flip(builder.folder / "weights" / "rank2.safetensors", -1)
    (builder.folder / "finished" / "rank1.json").write_text("{")
    with BundleBuilder.lead(out, plan) as builder:
        found = [builder.finished_artefact(key) for key in (ENGINE, LIBRARY, EAGER)]
        assert found == [False, False, True]
        source = source_of(model)
        assert [builder.finished_weights(r, source) for r in range(3)] == [True, False, False]
        finish(builder, model, plan)
    assert f"{ENGINE} of an earlier compile is made again: " in caplog.text
    assert "it has other files" in caplog.text
    assert without_report(out) == without_report(built)


def test_weights_of_another_source_or_plan_are_made_again(
    out: Path, model: Path, plan: DecoderPlan
) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        write_rank(builder, model, plan, 0)
        assert builder.finished_weights(0, source_of(model))
        assert not builder.finished_weights(0, "another source")
    with BundleBuilder.lead(out, plan) as builder:
        write_rank(builder, model, plan, 0)
    with BundleBuilder.lead(out, make_plan_of(model, (2, 2))) as builder:
        assert not builder.finished_weights(0, source_of(model))


def test_what_an_earlier_compile_left_and_nobody_wants_is_dropped(
    out: Path, built: Path, model: Path, plan: DecoderPlan
) -> None:
    four = make_plan_of(model, (2, 2))
    unwanted = "ab" * 32
    with BundleBuilder.lead(out, four) as builder:
        with builder.artefact(unwanted) as folder:
            (folder / "engine.trt").write_bytes(b"old")
        write_rank(builder, model, four, 3)
    with BundleBuilder.lead(out, plan) as builder:
        assert builder.finished_artefact(unwanted)
        finish(builder, model, plan)
    assert without_report(out) == without_report(built)


def test_random_weights_are_not_in_the_bundle(out: Path, model: Path, plan: DecoderPlan) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        write_rank(builder, model, plan, 0)
    huge = replace(plan, ranks=tuple(replace(r, weight_bytes=10**18) for r in plan.ranks))
    with BundleBuilder.lead(out, huge, has_weights=False) as builder:
        for key in FILES:
            write_artefact(builder, key)
        builder.publish(make_manifest(model, huge, source={}), report={})
    opened = Bundle.open(out)
    opened.verify()
    assert not opened.manifest.files_below("weights")
    with pytest.raises(IncompatibleError, match="holds no weights, it was compiled with random"):
        list(opened.weights(0, device=torch.device("cpu")))


def test_two_compiles_of_one_bundle_are_refused(out: Path, plan: DecoderPlan) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        write_artefact(builder, ENGINE)
        with (
            pytest.raises(PreflightError, match=r"out.lock: another compile \(process \d+\)"),
            BundleBuilder.lead(out, plan),
        ):
            pytest.fail("the lock was given twice")
        assert builder.finished_artefact(ENGINE)
        with BundleBuilder.lead(out.with_name("other"), plan):
            pass
    with BundleBuilder.lead(out, plan):
        pass


def test_a_published_part_must_be_finished(out: Path, model: Path, plan: DecoderPlan) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        fill(builder, model, plan, out.with_name("scratch"))
        more = {**ARTEFACTS, "cd" * 32: Artefact("eager", "mlp", 2)}
        with pytest.raises(InternalError, match=r"cdcd.* is not finished"):
            builder.publish(make_manifest(model, plan, artefacts=more), report={})
    assert not out.exists()


def test_the_first_of_two_ranks_with_one_artefact_wins(out: Path, plan: DecoderPlan) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        with builder.artefact(ENGINE) as folder:
            (folder / "engine.trt").write_bytes(b"slow")
            # Another process, say: its folder has another name.
            other = folder.with_name(f"{ENGINE}.1")
            other.mkdir()
            (other / "engine.trt").write_bytes(b"fast")
            BundleBuilder(out, plan)._finish_artefact(ENGINE, other)
        assert builder.finished_artefact(ENGINE)
        assert (builder.artefact_folder(ENGINE) / "engine.trt").read_bytes() == b"fast"


def test_an_existing_bundle_is_replaced_only_if_asked(
    bundle: Path, model: Path, plan: DecoderPlan
) -> None:
    with (
        pytest.raises(ConfigError, match=r"bundle is not empty; .* or use --overwrite"),
        BundleBuilder.lead(bundle, plan),
    ):
        pytest.fail("it may not be replaced")
    (bundle / "NOTES.md").write_text("old")
    two = make_plan_of(model, (2,))
    build_bundle(bundle, model, tp_sizes=(2,), overwrite=True)
    opened = Bundle.open(bundle)
    opened.verify()
    assert opened.plan == two
    assert not (bundle / "NOTES.md").exists()
    assert names_beside(bundle) == ["bundle"]


def test_a_bundle_that_appears_meanwhile_is_not_replaced(
    out: Path, built: Path, model: Path, plan: DecoderPlan
) -> None:
    with BundleBuilder.lead(out, plan) as builder:
        shutil.copytree(built, out)
        (out / "NOTES.md").write_text("theirs")
        with pytest.raises(ConfigError, match="is not empty"):
            finish(builder, model, plan)
    assert (out / "NOTES.md").read_text() == "theirs"


def test_an_old_bundle_that_a_kill_left_aside_is_not_taken_for_progress(
    bundle: Path, out: Path, built: Path, model: Path, plan: DecoderPlan
) -> None:
    bundle.rename(out.with_name("out.partial"))
    with BundleBuilder.lead(out, plan) as builder:
        assert not builder.finished_artefact(ENGINE)
        finish(builder, model, plan)
    assert without_report(out) == without_report(built)


@pytest.mark.parametrize("tp_sizes", [(2, 1), (3,)], ids=str)
def test_artefacts_of_an_older_bundle_are_taken_over_whatever_its_cut(
    tp_sizes: tuple[int, ...], out: Path, bundle: Path, tmp_path: Path
) -> None:
    other = make_checkpoint("llama", tmp_path / "other", seed=7)
    plan = make_plan_of(other, tp_sizes)
    with BundleBuilder.lead(out, plan, reuse_from=[bundle]) as builder:
        assert all(builder.finished_artefact(key) for key in FILES)
        assert not builder.finished_artefact("ef" * 32)
        assert not any(builder.finished_weights(r.rank, source_of(other)) for r in plan.ranks)
        finish(builder, other, plan)
    Bundle.open(out).verify()
    name = f"artefacts/{LIBRARY}/kernels/a.cubin"
    assert (out / name).stat().st_ino == (bundle / name).stat().st_ino
    shutil.rmtree(bundle)
    Bundle.open(out).verify()


def test_an_artefact_that_was_changed_is_not_taken_over(
    out: Path, bundle: Path, plan: DecoderPlan, caplog: pytest.LogCaptureFixture
) -> None:
    flip(bundle / "artefacts" / ENGINE / "engine.trt", 0)
    with BundleBuilder.lead(out, plan, reuse_from=[bundle]) as builder:
        assert [builder.finished_artefact(key) for key in (ENGINE, LIBRARY)] == [False, True]
    assert f"artefact {ENGINE} is not taken over from {bundle}: artefacts/" in caplog.text


def test_a_bundle_that_cannot_be_read_is_replaced_all_the_same(
    bundle: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(bundle / "manifest.json", 300)
    build_bundle(bundle, model, overwrite=True, reuse_from=[bundle])
    Bundle.open(bundle).verify()
    assert f"nothing is taken over from {bundle}: " in caplog.text


def test_a_bundle_may_take_over_from_the_one_that_it_replaces(bundle: Path, model: Path) -> None:
    engine = bundle / "artefacts" / ENGINE / "engine.trt"
    before = engine.stat().st_ino
    build_bundle(bundle, model, tp_sizes=(3,), overwrite=True, reuse_from=[bundle])
    assert engine.stat().st_ino == before
    Bundle.open(bundle).verify()


def test_an_artefact_may_not_hold_a_link(out: Path, plan: DecoderPlan) -> None:
    def build(builder: BundleBuilder) -> None:
        with builder.artefact(ENGINE) as folder:
            (folder / "engine.trt").symlink_to("/etc/hostname")

    with BundleBuilder.lead(out, plan) as builder:
        with pytest.raises(InternalError, match=r"engine\.trt is no plain file"):
            build(builder)
        assert not builder.finished_artefact(ENGINE)


def test_a_disk_that_is_too_small_is_said_at_once(out: Path, plan: DecoderPlan) -> None:
    huge = replace(plan, ranks=tuple(replace(r, weight_bytes=10**18) for r in plan.ranks))
    with (
        pytest.raises(PreflightError, match=r"the weights take 3,?000000000.0 GB and the disk"),
        BundleBuilder.lead(out, huge),
    ):
        pytest.fail("there is room for an exabyte")


FULL_DISK = """
import resource, signal
from pathlib import Path
import bundles
from runner.bundle.builder import BundleBuilder
from parallel.errors import PreflightError

out, model = Path(sys.argv[1]), Path(sys.argv[2])
plan = bundles.make_plan_of(model)
with BundleBuilder.lead(out, plan) as builder:
    # The kernel refuses to let any file grow beyond this, as it does when a disk is full.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        bundles.write_rank(builder, model, plan, 0)
    except PreflightError as error:
        print(error)
    print(builder.finished_weights(0, bundles.source_of(model)))
"""


def test_a_write_that_fails_is_one_line(out: Path, model: Path) -> None:
    done, _ = start(FULL_DISK, out, model, stdout=subprocess.PIPE).communicate(timeout=60)
    error, finished = done.splitlines()
    assert error == f"cannot write {out}.partial/weights/rank0.safetensors: File too large"
    assert finished == "False"


@pytest.mark.parametrize("spoil", [lambda out: out.write_text("x"), lambda out: out.mkdir()])
def test_a_file_or_an_empty_folder_at_the_target(
    spoil: Callable[[Path], object], out: Path, model: Path
) -> None:
    spoil(out)
    if out.is_file():
        with pytest.raises(ConfigError, match="is a file"):
            build_bundle(out, model)
    else:
        Bundle.open(build_bundle(out, model)).verify()


def test_a_target_that_is_reached_through_a_link_stays_one(
    tmp_path: Path, model: Path, plan: DecoderPlan
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    build_bundle(tmp_path / "link" / "deep" / "bundle", model)
    Bundle.open(tmp_path / "real" / "deep" / "bundle").verify()
    assert Bundle.open(tmp_path / "link" / "deep" / "bundle").plan == plan


def test_every_file_has_its_place(built: Path) -> None:
    places = {name: entry.place for name, entry in Bundle.open(built).manifest.files.items()}
    shown = {name: place and tuple(vars(place).values()) for name, place in places.items()}
    assert {n: place for n, place in shown.items() if place} == {
        "weights/rank0.safetensors": (0, 0, 0),
        "weights/rank1.safetensors": (1, 0, 1),
        "weights/rank2.safetensors": (2, 1, 0),
        CACHE_FILE: (1, 0, 1),
    }
