"""Every error code that the source can raise, found by reading it.

Run it to see the list: ``python docs/error_codes.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edge_agent", "export", "deploy")
CODE = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")
# Calls whose first argument, or whose keyword `code`, names a fault.
RAISERS = re.compile(r"(Edge|Transient|Permanent|Integrity|Refused)Error|ErrorInfo")
FILE_SUFFIXES = frozenset(
    {"data", "html", "json", "jsonl", "onnx", "pem", "py", "safetensors", "sqlite", "toml", "yaml"}
)


def error_codes(root: Path = ROOT) -> dict[str, list[str]]:
    """Codes and the files in which they are spelled, sorted.

    The calls that raise say which areas there are; then every literal ``area.fault`` of such an area is a code,
    because codes also stand in tables, defaults and counters.
    """
    trees = {
        str(path.relative_to(root)): ast.parse(path.read_text("utf-8"), str(path))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    # errors.py maps the operating system's errors by a table, without a raise of its own.
    areas = {"net", "os"} | {code.partition(".")[0] for tree in trees.values() for code in _raised(tree)}
    found: dict[str, list[str]] = {}
    for where, tree in trees.items():
        for code in sorted(set(_literals(_without_log_names(tree)))):
            area, _, fault = code.partition(".")
            if area in areas and fault not in FILE_SUFFIXES:
                found.setdefault(code, []).append(where)
    return dict(sorted(found.items()))


def _without_log_names(tree: ast.Module) -> list[ast.AST]:
    names = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).startswith(("_log.", "log."))
    }
    return [node for node in ast.walk(tree) if id(node) not in names]


def _raised(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and RAISERS.fullmatch(_name(node.func)):
            yield from _literals([*node.args[:1], *(k.value for k in node.keywords if k.arg == "code")])


def _literals(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
            yield node.value


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
        case ast.IfExp():
            # (TransientError if busy else PermanentError)("area.fault", …)
            return _name(node.body)
    return ""


if __name__ == "__main__":
    for known_code, files in error_codes().items():
        print(f"{known_code:32} {', '.join(files)}")
