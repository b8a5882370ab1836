"""The source tree's rules: who may import whom, what stays private, what is exported, how long files are."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("proto", "strategies", "client", "server")
# What protoc writes keeps no rules of ours.
GENERATED = "_pb2"
FILES = sorted(
    path
    for root in ROOTS
    for path in (REPOSITORY / root / "turnout").rglob("*.py")
    if GENERATED not in path.name
)
FENCE = REPOSITORY / "proto/turnout/wire/flower.py"

# What each part may import of the others.
ALLOWED = {
    "wire": {"wire", "v1"},
    "strategies": {"strategies", "allocation", "wire"},
    "client": {"client", "allocation", "optim", "peft", "tasks", "wire", "v1"},
    "optim": {"optim", "tasks", "wire"},
    "peft": {"peft", "allocation", "tasks", "wire"},
    "allocation": {"allocation", "wire"},
    "tasks": {"allocation", "optim", "tasks", "wire"},
    "server": {"server", "strategies", "wire", "v1"},
    "dashboard": {"dashboard", "server", "strategies", "wire"},
}
EVERYTHING = {"simulation", "reproduce", "experiment", "cli"}
TORCH_FREE = ("wire", "allocation", "strategies", "server", "dashboard")
PRIVATE_TOUCHES = ('"_message_id"', "TaskIdentity", "create_empty", "_is_dirty")
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")


def part_of(path: Path) -> str:
    for root in ROOTS:
        base = REPOSITORY / root / "turnout"
        if path.is_relative_to(base):
            return path.relative_to(base).parts[0].removesuffix(".py")
    raise AssertionError(path)


@lru_cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that ``path`` imports, also inside functions, with the line."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} relative import"
            # `from turnout import wire` imports turnout.wire.
            module = node.module or ""
            if module in ("turnout", "flwr"):
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_tree_is_where_this_test_looks() -> None:
    assert {part_of(path) for path in FILES} >= {"wire", "strategies"}
    assert FENCE.is_file()
    assert not [root for root in ROOTS if (REPOSITORY / root / "turnout" / "__init__.py").exists()]


def test_dependency_rule() -> None:
    broken = []
    for path in FILES:
        part = part_of(path)
        assert part in ALLOWED or part in EVERYTHING, f"{part} is not in the dependency rule; add it"
        for module, line in imports(path) if part in ALLOWED else []:
            if module.startswith("turnout.") and module.split(".")[1] not in ALLOWED[part]:
                broken.append(f"{name_of(path)}:{line} imports {module}")
    assert not broken


def test_no_torch_in_the_source() -> None:
    assert not [
        f"{name_of(path)}:{line}"
        for path in FILES
        if part_of(path) in TORCH_FREE
        for module, line in imports(path)
        if module.split(".")[0] == "torch"
    ]


def is_public(module: str) -> bool:
    private = any(piece.startswith("_") for piece in module.split("."))
    return not private and any(module == name or module.startswith(f"{name}.") for name in PUBLIC_FLOWER)


def test_only_the_fence_touches_flowers_private_parts() -> None:
    broken = []
    for path in FILES:
        if path == FENCE:
            continue
        for module, line in imports(path):
            if module.split(".")[0] == "flwr" and not is_public(module):
                broken.append(f"{name_of(path)}:{line} imports {module}")
        source = path.read_text(encoding="utf-8")
        broken += [f"{name_of(path)} uses {touch}" for touch in PRIVATE_TOUCHES if touch in source]
    assert not broken, "these belong into turnout/wire/flower.py"


def test_this_test_sees_what_the_fence_does() -> None:
    source = FENCE.read_text(encoding="utf-8")
    assert [touch for touch in PRIVATE_TOUCHES if touch in source] == list(PRIVATE_TOUCHES)
    assert not all(is_public(module) for module, _ in imports(FENCE) if module.startswith("flwr"))


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length >= 400}


IMPORTS = """
import sys, threading, numpy
threads, state = threading.active_count(), numpy.random.get_state()[1].sum()
import turnout.wire, turnout.strategies, turnout.server
assert 'torch' not in sys.modules, 'torch was imported'
assert threading.active_count() == threads, 'a thread was started'
assert numpy.random.get_state()[1].sum() == state, 'the global generator was touched'
"""


def test_imports_leave_torch_threads_and_seeds_alone() -> None:
    environment = {"PYTHONPATH": ":".join(str(REPOSITORY / root) for root in ROOTS), "PATH": ""}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PACKAGES = sorted(
    f"turnout.{part_of(path)}"
    for path in FILES
    if path.name == "__init__.py" and len(path.relative_to(REPOSITORY).parts) == 4
    if path.read_text(encoding="utf-8").strip()
)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_exactly_what_is_exported(package: str) -> None:
    module = importlib.import_module(package)
    brought = {
        name
        for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("turnout.")
        for name in (alias.asname or alias.name for alias in node.names)
    }
    assert set(module.__all__) >= brought, f"not in __all__: {sorted(brought - set(module.__all__))}"
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        item = getattr(module, name)  # Raises when __all__ promises what is not there.
        if isinstance(item, type) or (callable(item) and hasattr(item, "__code__")):
            assert item.__doc__, f"{package}.{name} has no docstring"
