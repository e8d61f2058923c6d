"""What is a repository of the Hub, and what a local path."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterpack import hub
from adapterpack.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("org/name", "org/name", None, ""),
        ("hf://org/name", "org/name", None, ""),
        ("hf://models/org/name", "org/name", None, ""),
        ("org/name/", "org/name", None, ""),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None, ""),
        ("org/name@main", "org/name", "main", ""),
        (f"org/name@{COMMIT}", "org/name", COMMIT, ""),
        ("org/name/a/b", "org/name", None, "a/b"),
        ("org/name@v1.0/a", "org/name", "v1.0", "a"),
        ("org/name@refs/pr/3/a", "org/name", "refs/pr/3", "a"),
        ("org/name@feature%2Fx/a", "org/name", "feature/x", "a"),
        ("hf://org/name/packed/adapter.apack", "org/name", None, "packed/adapter.apack"),
    ],
)
def test_a_reference_says_repository_revision_and_place(
    text: str, repo: str, revision: str | None, path: str
) -> None:
    found = hub.parse(text)
    assert (found.repo, found.revision, found.path) == (repo, revision, path)
    assert hub.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        *(
            "./org/name",
            "/org/name",
            "~/name",
            "name",
            "",
            ".",
            "org/name.safetensors",
            "org/name.apack",
            "org/x.bin",
        ),
        *("a b/c", "org\\name", "C:/name"),
    ],
)
def test_what_looks_like_a_path_is_one(text: str) -> None:
    assert hub.find(text) is None


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.find("org/name") is not None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.find("org/name") is None
    assert hub.find("hf://org/name") is not None
    assert hub.find(Path("org/other")) is None, "a Path is a path"


@pytest.mark.parametrize(
    "text",
    [
        *("hf://name", "hf://datasets/org/name", "hf://spaces/org/name", "hf://org/name@", "hf://org/name@a..b"),
        *("hf://org/name/../x", "hf://org/name/a//b", "hf://org/name/aux", "hf://org/name@-x", "hf:///etc/passwd"),
        *("hf://org/name@main/a@b", "hf://org/name@a%00b", "hf://org/name/a\nb"),
    ],
)
def test_what_is_marked_as_a_reference_must_be_one(text: str) -> None:
    with pytest.raises(UsageError):
        hub.find(text)
