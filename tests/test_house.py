"""Rules about the code as a whole: who may import whom, and the sizes of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = [ROOT / f"{name}.py" for name in ("train", "convert", "evaluate")]
ROOMS = ("pipeline", "model", "experiment", "evaluation")
ROOM_FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
BENCH_FILES = sorted((ROOT / "bench").rglob("*.py"))
SOURCE_FILES = [*COMMANDS, *ROOM_FILES, *BENCH_FILES]
OWN = {*ROOMS, "bench", *(path.stem for path in COMMANDS)}

MAY_IMPORT = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "experiment": {"experiment", "pipeline", "model"},
    "evaluation": {"evaluation", "experiment", "pipeline", "model"},
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    name = relative(path).removesuffix(".py").removesuffix("/__init__")
    return name.replace("/", ".")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def import_nodes(
    path: Path, *, at_module_level: bool = False
) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports of a file, or only those that run when it is imported."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if at_module_level and (in_function or is_type_checking(node)):
            skipped.update(ast.walk(node))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in skipped:
            yield node


def imported_names(path: Path, *, at_module_level: bool = False) -> set[str]:
    """The absolute dotted names that a file imports: `a.b` for `import a.b` and for `from a import
    b`.
    """
    package = relative(path).split("/")[:-1]
    names = set()
    for node in import_nodes(path, at_module_level=at_module_level):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
            continue
        above = package[: len(package) - node.level + 1] if node.level else []
        module = [*above, node.module] if node.module else above
        names.update(".".join([*module, alias.name]) for alias in node.names)
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & OWN


@pytest.mark.parametrize("path", ROOM_FILES, ids=relative)
def test_a_room_imports_only_the_rooms_that_it_may(path: Path) -> None:
    room = relative(path).partition("/")[0]
    assert rooms_of(imported_names(path)) <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", ROOM_FILES, ids=relative)
def test_imports_within_a_room_are_relative(path: Path) -> None:
    """So that `pip install .` can offer the rooms under another name."""
    room = relative(path).partition("/")[0]
    for node in import_nodes(path):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").partition(".")[0] != room
        if isinstance(node, ast.Import):
            assert room not in {alias.name.partition(".")[0] for alias in node.names}


@pytest.mark.parametrize(
    "path", [path for path in ROOM_FILES if relative(path).startswith("evaluation/")], ids=relative
)
def test_evaluation_finds_the_other_rooms_through_one_file(path: Path) -> None:
    """Installed, they have other names. Only type checkers, which run in the repository, may ignore
    that.
    """
    if path.name == "sibling_packages.py":
        return
    tree = ast.parse(path.read_text())
    for_type_checkers = {
        child for node in ast.walk(tree) if is_type_checking(node) for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_type_checkers:
            continue
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & OWN
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").partition(".")[0] not in OWN


@pytest.mark.parametrize("path", SOURCE_FILES, ids=relative)
def test_nothing_imports_a_command(path: Path) -> None:
    commands = {command.stem for command in COMMANDS}
    assert not {name.partition(".")[0] for name in imported_names(path)} & commands


@pytest.mark.parametrize(
    "path",
    [*COMMANDS, *(path for path in ROOM_FILES if relative(path).startswith("experiment/"))],
    ids=relative,
)
def test_the_command_line_is_answered_before_torch_is_loaded(path: Path) -> None:
    names = imported_names(path, at_module_level=True)
    assert not {name.partition(".")[0] for name in names} & {
        *("torch", "torchvision", "pipeline", "model")
    }


def test_help_is_printed_without_loading_torch() -> None:
    """What is tested above, for everything that is imported indirectly."""
    code = (
        "import sys, runpy\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    for command in COMMANDS:
        subprocess.run(
            [sys.executable, "-c", code, command],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=120,
        )


@pytest.mark.parametrize(
    ("library", "home"),
    [("nvidia.dali", "pipeline/decoders/dali.py"), ("ffcv", "pipeline/decoders/ffcv.py")],
)
def test_a_decoders_library_is_imported_only_in_its_file(library: str, home: str) -> None:
    users = {
        relative(path)
        for path in (*COMMANDS, *ROOM_FILES)
        if any(name == library or name.startswith(f"{library}.") for name in imported_names(path))
    }
    assert users == {home}


def test_no_import_cycles() -> None:
    """Of modules at module level. A submodule and the `__init__` of its package count as two."""
    modules = {module_name(path): path for path in SOURCE_FILES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imported_names(path, at_module_level=True):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules:
                graph[module].add(target)
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for target in graph[module]:
                visit(target, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])


def test_no_tracked_file_is_large_and_none_is_called_utils() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listing.stdout.split("\0") if name]
    tracked = [path for path in tracked if path.exists()]
    assert not [relative(path) for path in tracked if path.stat().st_size > 1 << 20]
    assert not [relative(path) for path in tracked if path.name == "utils.py"]


def test_the_readme_is_short() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("an installed copy has no README")
    lines = readme.read_text().splitlines()
    assert len(lines) <= 150
    paragraphs = readme.read_text().split("\n\n")
    for paragraph in paragraphs:
        is_prose = not paragraph.startswith(("```", "|", "    ", "- ", "#", "\n"))
        if is_prose and "\n    " not in paragraph:
            assert len(paragraph.splitlines()) <= 4, paragraph
