"""Imports run one way through the packages, and heavy ones wait until they are needed."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Highest first: a package imports from its own level and from those below it, never from above.
LEVELS = (
    {"runner.__main__"},
    {"runner.cli"},
    {"runner.serve", "runner.bench", "runner.build"},
    {"runner.engine", "runner.pipeline"},
    {"runner.joining", "runner.bundled", "runner.jobs"},
    {"runner.planning", "runner.graph_planning"},
    {"runner.job"},
    {
        "runner.bundle",
        "runner.compiler",
        "runner.quantize",
        "runner.items",
        "runner.prompts",
        "runner.models",
        "runner.sources",
        "runner.text",
        "runner.importer",
    },
    {"runner.config", "runner.drawing", "runner.observe"},
    {"parallel"},
)


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        source: dotted name of the module that imports.
        target: dotted name of what it imports: a module, or a name that is none of our modules.
        is_eager: it runs when the module is imported, rather than in a function or for a type
            checker alone.
    """

    source: str
    target: str
    is_eager: bool


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of `parallel` and `runner`; a package's name stands for its __init__."""
    files = [file for package in ("parallel", "runner") for file in root.glob(f"{package}/**/*.py")]
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    return {n.removesuffix(".__init__"): file for n, file in zip(names, files, strict=True)}


def imports_of(root: Path) -> list[Import]:
    """Every import statement of the tree, those inside functions included."""
    modules = modules_of(root)
    return [
        Import(source, target, is_eager)
        for source, file in modules.items()
        for node, is_eager in _statements(ast.parse(file.read_text()), is_eager=True)
        for target in _targets(node, modules)
    ]


def _statements(node: ast.AST, *, is_eager: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All import statements below a node, and whether each runs on import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_eager
        waits = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _statements(child, is_eager=is_eager and not waits and not for_types)


def _targets(node: ast.AST, modules: Iterable[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    assert node.level == 0, "imports are absolute"
    assert node.module is not None
    # `from runner.models import spec` imports the module spec, if there is one.
    full = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules else node.module for name in full]


def package_of(module: str) -> str:
    """`parallel`, a package of runner such as `runner.cli`, or the name of another library."""
    name = module.split(".")
    return ".".join(name[:2]) if name[0] == "runner" else name[0]


def arrows_that_run_back(imports: Iterable[Import]) -> list[str]:
    """Imports of a package from a level above, and packages that have no level."""
    level = {package: i for i, packages in enumerate(LEVELS) for package in packages}
    faults = []
    for found in imports:
        source, target = package_of(found.source), package_of(found.target)
        if target.partition(".")[0] not in ("parallel", "runner"):
            continue
        for package in (source, target):
            if package not in level:
                faults.append(f"{package} has no place in LEVELS")
        if level.get(target, 0) < level.get(source, 0):
            faults.append(f"{found.source} imports {found.target}")
    return faults


def cycle_of(arrows: Iterable[tuple[str, str]]) -> list[str]:
    """The nodes of one cycle, the first one again at the end; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for source, target in arrows:
        if source != target:
            graph.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def module_cycle(imports: Iterable[Import]) -> list[str]:
    """Modules that cannot be imported one without the other."""
    return cycle_of((i.source, i.target) for i in imports if i.is_eager)


def package_cycle(imports: Iterable[Import]) -> list[str]:
    """Packages, of one level perhaps, that import each other anywhere in their code."""
    return cycle_of((package_of(i.source), package_of(i.target)) for i in imports)


def torch_tensorrt_faults(imports: Iterable[Import]) -> list[str]:
    """It fails where there is no driver: one file imports it, inside a function."""
    found = [i for i in imports if i.target.split(".")[0] == "torch_tensorrt"]
    eager = [f"{i.source} imports it at module level" for i in found if i.is_eager]
    sources = sorted({i.source for i in found})
    return eager + ([f"several files import it: {', '.join(sources)}"] if len(sources) > 1 else [])


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = imports_of(ROOT)
    assert Import("runner.planning", "parallel.planner", is_eager=True) in found
    assert Import("parallel.launch", "torch.distributed", is_eager=False) in found
    return found


def test_imports_run_one_way(imports: list[Import]) -> None:
    assert arrows_that_run_back(imports) == []


def test_no_module_needs_itself(imports: list[Import]) -> None:
    assert module_cycle(imports) == []


def test_no_packages_need_each_other(imports: list[Import]) -> None:
    assert package_cycle(imports) == []


def test_torch_tensorrt_is_imported_in_one_place_and_late(imports: list[Import]) -> None:
    assert torch_tensorrt_faults(imports) == []


@pytest.mark.parametrize("modules", ["runner.cli.app", "runner.planning, parallel.launch"])
def test_planning_and_help_need_no_torch(modules: str) -> None:
    heavy = {"torch", "transformers", "tokenizers", "gguf", "numpy", "jinja2", "rich", "pynvml"}
    loaded = subprocess.run(
        [sys.executable, "-c", f"import {modules}, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "parallel.errors" in loaded
    assert heavy.isdisjoint(loaded)


def write_tree(root: Path, **modules: str) -> list[Import]:
    """The imports of a tree of modules whose names have `__` for a dot."""
    for name, text in modules.items():
        file = root / Path(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return imports_of(root)


def test_a_clean_tree_has_no_faults(tmp_path: Path) -> None:
    found = write_tree(
        tmp_path,
        parallel__plan="import torch",
        runner__config__load="from parallel.plan import Plan",
        runner__bundle__build="from runner.compiler import cut",
        runner__compiler__cut="def f():\n    import torch_tensorrt",
        runner__engine__engine="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import x",
        runner__planning="from runner.config import load",
        runner__cli__app="def main():\n    from runner.planning import load",
    )
    assert arrows_that_run_back(found) == torch_tensorrt_faults(found) == []
    assert module_cycle(found) == package_cycle(found) == []
    assert Import("runner.planning", "runner.config.load", is_eager=True) in found
    assert Import("runner.engine.engine", "x", is_eager=False) in found


def test_arrows_that_run_back_are_found_even_inside_functions(tmp_path: Path) -> None:
    found = write_tree(
        tmp_path,
        parallel__plan="from runner.config.load import load",
        runner__config__load="def load():\n    import runner.engine.engine",
        runner__engine__engine="class Engine:\n    from runner.cli import app",
        runner__cli__app="",
        runner__models__spec="from runner import planning",
        runner__planning="",
        runner__extra__new="import parallel.plan",
    )
    assert sorted(arrows_that_run_back(found)) == [
        "parallel.plan imports runner.config.load",
        "runner.config.load imports runner.engine.engine",
        "runner.engine.engine imports runner.cli.app",
        "runner.extra has no place in LEVELS",
        "runner.models.spec imports runner.planning",
    ]


def test_cycles_are_found(tmp_path: Path) -> None:
    found = write_tree(
        tmp_path,
        parallel__a="import parallel.b",
        parallel__b="from parallel import c",
        parallel__c="try:\n    import parallel.a\nexcept ImportError:\n    pass",
        runner__models__x="def f():\n    import runner.text.y",
        runner__text__y="import runner.models.x",
    )
    assert module_cycle(found) == ["parallel.a", "parallel.b", "parallel.c", "parallel.a"]
    assert package_cycle(found) == ["runner.models", "runner.text", "runner.models"]


def test_stray_imports_of_torch_tensorrt_are_found(tmp_path: Path) -> None:
    found = write_tree(
        tmp_path,
        runner__compiler__a="from torch_tensorrt.dynamo import convert",
        runner__compiler__b="def f():\n    import torch_tensorrt as trt",
    )
    assert torch_tensorrt_faults(found) == [
        "runner.compiler.a imports it at module level",
        "several files import it: runner.compiler.a, runner.compiler.b",
    ]
