"""The house stays a house: small rooms, one-way imports, no dangerous calls, documents that are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adapterpack"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "limits", "version"},
    {"io", "tensor"},
    {"codecs"},
    {"draws"},
    {"adapter", "checkpoint", "recipes", "architectures", "experts", "names"},
    {"backend", "exactness", "vectormath"},
    {"methods", "containers"},
    {
        "base",
        "quantised",
        "hub",
        "sources",
        "release",
        "plan",
        "casting",
        "conversion",
        "card",
        "accuracy",
        "tiles",
        "evidence",
        "parts",
        "pairs",
        "rounding",
        "diagnosis",
        "regeneration",
        "merged_model",
        "arithmetic",
        "shards",
        "base_files",
        "layout",
        "lineage",
        "engines",
        "engine_rules",
        "serving",
        "onescale",
        "extras",
        "projections",
        "peft_versions",
        "pairing",
        "rest",
        "svd",
        "nearest",
        "initial",
        "health",
        "prompts",
        "running",
        "answers",
    },
    {
        "inspect",
        "check",
        "fix",
        "diff",
        "movement",
        "measuring",
        "convert",
        "compress",
        "shrink",
        "quantise",
        "pack",
        "unpack",
        "resize",
        "combine",
        "extract",
        "verify",
        "behaviour",
        "merge",
        "staging",
        "push",
        "pull",
    },
    {"report"},
    {"cli"},
]
RANK = {name: n for n, layer in enumerate(LAYERS) for name in layer}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Rooms that a file imports when it runs; what only type checkers see does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    rooms: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "adapterpack":
            rooms |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adapterpack."):
            rooms.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("adapterpack.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = _room(path)
    if room in ("__init__", "__main__"):
        return
    upward = {other for other in _imports(path) if RANK[other] > RANK[room]}
    assert not upward, f"{room} imports {upward}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            body = node.end_lineno - node.body[0].lineno + 1
            assert body <= 60, f"{node.name} has {body} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dangerous_things_stand_in_one_place(path: Path) -> None:
    text = path.read_text()
    name = path.relative_to(PACKAGE).as_posix()
    assert ("torch.load" in text) == (name == "containers/pickled.py")
    assert "weights_only=False" not in text
    assert not re.search(
        r"^\s*(import|from) pickle\b|(?<![\w.])(eval|exec)\(|trust_remote_code(?!=False)", text, re.M
    )
    assert "huggingface_hub import" not in text or name.startswith("hub/")
    assert not re.search(r"^\s*(import|from) peft\b|^(import|from) transformers\b", text, re.M)
    late = re.search(r"^\s+(import|from) transformers\b", text, re.M)
    assert (late is not None) == (name == "running.py"), "transformers is an extra: in one place, late"
    if not name.startswith("cli/"):
        assert not re.search(r"(?<!\w)(print|sys\.exit|exit)\(", text), "the library never prints and never exits"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_public_thing_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module without a docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            trivial = isinstance(node, ast.ClassDef) and node.bases and len(node.body) <= 2
            known = node.name in {"parse", "changes", "recipes", "findings", "ranks", "command", "write"}
            assert ast.get_docstring(node) or trivial or known, node.name


def test_the_map_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = {_room(p) for p in FILES} - {"__init__", "__main__", "version"}
    assert all(room in text for room in rooms), [r for r in rooms if r not in text]


def test_the_readme_names_both_commands_and_every_verb() -> None:
    from adapterpack.cli import VERBS

    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text
    assert all(f"adapterpack {verb}" in text for verb in VERBS)


def test_every_command_of_the_readme_runs_as_printed(tmp_path: Path) -> None:
    """The shell blocks of "Use" and the Python block, from a copy of the examples."""
    text = (ROOT / "README.md").read_text()
    use = text[text.index("## Use") : text.index("### Tab completion")]
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", use, re.S))
    python = "\n".join(re.findall(r"```python\n(.*?)```", use, re.S))
    assert shell.count("adapterpack") >= 10 and "compress" in python
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapterpack").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m adapterpack "$@"\n')
    (tmp_path / "bin" / "adapterpack").chmod(0o755)
    shell = shell.replace(".venv/bin/python", f'"{sys.executable}"')
    script = f'set -eu\nPATH="{tmp_path}/bin:$PATH"\n{shell}'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
