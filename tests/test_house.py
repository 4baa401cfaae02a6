"""The lines that hold the house together: who may import whom, and how much there is to read."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERBS = [ROOT / f"{name}.py" for name in ("train", "convert", "evaluate")]
EVALUATIONS = [ROOT / f"{name}.py" for name in ("protocols", "subject", "classifier", "results")]
TALK = [
    ROOT / f"{name}.py"
    for name in (
        "presets",
        "runlog",
        "run_folder",
        "metrics",
        "provenance",
        "verdict",
        "report",
        "held_out",
    )
]
CHAPTERS = [*VERBS, *EVALUATIONS, *TALK]
ROOMS = [path for room in ("pipeline", "model") for path in sorted((ROOT / room).rglob("*.py"))]
BENCH = sorted((ROOT / "bench").rglob("*.py"))
OWN = {path.stem for path in CHAPTERS} | {"pipeline", "model", "bench"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, at_module_level: bool = False) -> Iterator[tuple[int, str]]:
    """(0, or the number of leading dots; the absolute name) of everything that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if (
        at_module_level
    ):  # what runs when it is imported: not in functions, nor for type checkers alone
        lazy = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.Lambda))]
        lazy += [
            n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
        ]
        inside = {id(child) for node in lazy for child in ast.walk(node)}
        nodes = [node for node in nodes if id(node) not in inside]
    package = path.relative_to(ROOT).parent.parts
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, node.module or "")).strip(".")
            yield from ((node.level, f"{module}.{alias.name}") for alias in node.names)


def tops(path: Path, *, at_module_level: bool = False) -> set[str]:
    return {name.partition(".")[0] for _, name in imports(path, at_module_level=at_module_level)}


@pytest.mark.parametrize("path", ROOMS, ids=named)
def test_a_room_imports_neither_the_other_nor_a_verb(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert tops(path) & OWN <= {room}


@pytest.mark.parametrize("path", ROOMS, ids=named)
def test_within_a_room_imports_are_relative(path: Path) -> None:
    """So that `pip install .` can offer the rooms under another name."""
    assert not {name.partition(".")[0] for level, name in imports(path) if level == 0} & OWN


@pytest.mark.parametrize("path", [*CHAPTERS, *ROOMS, *BENCH], ids=named)
def test_nothing_imports_a_verb(path: Path) -> None:
    assert not tops(path) & {verb.stem for verb in VERBS}


@pytest.mark.parametrize(
    "name", ["train", "evaluate", *(path.stem for path in (*EVALUATIONS, *TALK))]
)
def test_the_command_line_is_answered_before_torch_is_loaded(name: str) -> None:
    loaded = tops(ROOT / f"{name}.py", at_module_level=True)
    assert not loaded & {"torch", "torchvision", "pipeline", "model"}


@pytest.mark.parametrize(("library", "home"), [("nvidia.dali", "dali.py"), ("ffcv", "ffcv.py")])
def test_a_decoders_library_is_imported_in_its_file_alone(library: str, home: str) -> None:
    users = {
        named(path)
        for path in (*CHAPTERS, *ROOMS)
        if any(name == library or name.startswith(library + ".") for _, name in imports(path))
    }
    assert users <= {f"pipeline/decoders/{home}"}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_what_one_comes_for_is_read_in_one_evening() -> None:
    """Everything between images and weights; who wants more has three more evenings: for formats, for what is said, and
    for what weights are worth (the evaluations, and other projects' files), without which all the rest works."""
    sizes = {named(path): lines(path) for path in (*CHAPTERS, *ROOMS)}
    formats = {name for name in sizes if name == "convert.py" or Path(name).parent.name == "stores"}
    formats -= {f"pipeline/stores/{name}.py" for name in ("__init__", "folder")}
    talk = {named(path) for path in TALK}
    evaluations = {named(path) for path in (ROOT / "evaluate.py", *EVALUATIONS)}
    evaluations |= {
        f"model/{name}.py"
        for name in ("features", "knn", "heads", "svm", "layouts", "foreign", "continuation")
    }
    assert sum(sizes[name] for name in formats) <= 3000
    assert sum(sizes[name] for name in talk) <= 1500
    assert sum(sizes[name] for name in evaluations) <= 2250
    assert (
        sum(size for name, size in sizes.items() if name not in formats | talk | evaluations)
        <= 4200
    )
    assert sizes["train.py"] <= 250
    assert not {name: size for name, size in sizes.items() if size > 330}
    readme = ROOT / "README.md"
    assert not readme.exists() or lines(readme) <= 200


def test_no_tracked_file_is_large_and_none_is_a_drawer() -> None:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).exists()]
    assert not [named(path) for path in tracked if path.stat().st_size > 1 << 20]
    assert not [named(path) for path in (*tracked, *ROOMS) if path.name == "utils.py"]
