"""House rules that no linter knows. Import rules are proven in tests/house/test_import_rules.py."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("edge_agent", "export", "deploy")
MAX_LINES = 400

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def suite() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8"), str(path)))


def shown(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{path.relative_to(ROOT)}{line}"


# --- packaging


def distribution(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return found.group().lower()


def test_a_gateway_downloads_no_training_or_export_library() -> None:
    base = {distribution(r) for r in PROJECT["project"]["dependencies"]}
    heavy = {"torch", "transformers", "optimum", "optimum-onnx", "mobius-onnx", "onnx", "onnxscript", "onnx-ir", "rich"}
    assert not base & heavy


def test_the_demo_needs_no_torch() -> None:
    for extra in ("fleet", "demo"):
        assert not {distribution(r) for r in EXTRAS[extra]} & {"torch", "transformers", "optimum"}


def test_torch_is_the_one_version_that_was_tried() -> None:
    assert "torch==2.13.0" in EXTRAS["export"]
    assert "TORCH   := torch==2.13.0" in (ROOT / "Makefile").read_text("utf-8")


def test_every_base_dependency_says_what_it_weighs_and_why() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for requirement in PROJECT["project"]["dependencies"]:
        line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
        assert re.search(r"# +[\d.]+ MB +\w+", line), line


@pytest.mark.needs("module:setuptools")
def test_the_wheel_holds_the_packages_and_their_files_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.data")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "docs", tree / "docs")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
            *("--disable-pip-version-check", "--wheel-dir", tmp_path, tree),
        ],
        check=True,
        capture_output=True,
        timeout=100,
    )
    (wheel,) = tmp_path.glob("edge_agent-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    version = PROJECT["project"]["version"]
    own = (f"edge_agent-{version}.dist-info/", f"edge_agent-{version}.data/data/share/doc/edge-agent/")
    assert {name.split("/")[0] for name in names if not name.startswith(own)} == set(PACKAGES)
    assert f"{own[1]}errors.md" in names
    assert not {name for name in names if name.endswith((".onnx", ".safetensors"))}, "models travel as releases"
    expected = [
        path
        for package in PACKAGES
        for pattern in ("**/*.py", "py.typed", "keys/*.pem", "targets/*.toml", "reference/task/*")
        for path in (ROOT / package).glob(pattern)
        if path.is_file()
    ]
    missing = {str(path.relative_to(ROOT)) for path in expected} - names
    assert not missing


# --- a light agent process


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sorted(sys.modules))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["edge_agent.__main__", "edge_agent.agent", "edge_agent.runtime.worker_process"])
def test_the_agent_process_loads_no_inference_library(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not loaded & {"onnxruntime", "numpy", "llguidance", "tokenizers", "torch", "onnx"}


def test_the_agent_process_loads_tuf_only_when_it_verifies() -> None:
    assert "tuf" not in modules_after("import edge_agent.agent")


# --- rooms and names


def test_no_module_has_outgrown_its_room() -> None:
    lengths = {shown(path): len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


BANNED = {"manager", "handler", "util", "utils", "helper", "helpers", "common", "data", "process"}
# Names that a library's interface asks for.
REQUIRED = {"do_GET", "do_HEAD", "do_POST", "do_PUT", "_get_handler"}


def is_banned(name: str) -> bool:
    if name in REQUIRED:
        return False
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    last = words[-1].lower() if words else ""
    # `data` and `process` say nothing alone; `worker_process` and `train_data` do.
    return (
        name.strip("_").lower() in BANNED or last in BANNED - {"data", "process"} or name.lstrip("_").startswith("do_")
    )


@pytest.mark.parametrize("name", ["Manager", "SlotManager", "helpers", "do_update", "process", "_handler", "data"])
def test_names_that_say_nothing_are_recognised(name: str) -> None:
    assert is_banned(name)


@pytest.mark.parametrize("name", ["WorkerProcess", "slots", "do_GET", "train_data", "document", "processing"])
def test_names_that_say_something_are_not(name: str) -> None:
    assert not is_banned(name)


def test_modules_classes_and_functions_have_names_that_say_something() -> None:
    modules = [shown(path) for path in sources() if is_banned(path.stem)]
    definitions = [
        f"{shown(path, node)} {node.name}"
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and is_banned(node.name)
    ]
    assert not modules + definitions


def test_no_constructor_takes_more_than_seven_arguments() -> None:
    found = []
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][1:]
                if len(arguments) > 7:
                    found.append(shown(path, node))
    assert not found, "pass a frozen settings section instead"


# --- rules with one owner


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_only_fs_replaces_files() -> None:
    found = [
        shown(path, call)
        for path in sources()
        if path != ROOT / "edge_agent/fs.py"
        for call, name in calls(path)
        if name in {"os.replace", "os.rename", "shutil.move"}
    ]
    assert not found, "durable writes go through edge_agent.fs"


def test_only_transient_errors_are_retried() -> None:
    for path in sources():
        for call, name in calls(path):
            if name.endswith("retry_if_exception_type"):
                assert [ast.unparse(a) for a in call.args] == ["TransientError"], shown(path, call)
            if name.endswith(("retry_if_exception", "retry_if_not_exception_type")):
                pytest.fail(f"{shown(path, call)}: use retry_if_exception_type(TransientError)")


def test_tests_replace_seams_and_never_internals() -> None:
    forbidden = {"monkeypatch.setattr", "mock.patch", "patch", "patch.object", "mocker.patch", "mock.patch.object"}
    found = [shown(path, call) for path in suite() for call, name in calls(path) if name in forbidden]
    assert not found


# --- what is published


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.stat().st_size < 2_000_000:
            content = path.read_bytes()
            if b"\0" not in content:
                yield name, content.decode("utf-8", "replace")


def test_no_tracked_file_names_a_package_registry_or_somebodys_home() -> None:
    # Put together here, so that this file does not find itself.
    hosts = [rf"{name}\.org" for name in ("pypi", "pythonhosted", "npmjs", "anaconda", r"download\.pytorch")]
    homes = [rf"(?<![\w.])/{name}/" for name in ("root", "work", "home")]
    pattern = re.compile("|".join(hosts + homes))
    found = [f"{name}: {match.group()}" for name, text in tracked_texts() for match in pattern.finditer(text)]
    assert not found


def test_systemd_and_ansible_never_become_importable() -> None:
    assert "systemd" not in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not [path for folder in ("systemd", "ansible") for path in (ROOT / folder).rglob("*.py")]
