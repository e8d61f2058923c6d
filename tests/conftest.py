"""Shared by all tests: one workshop that keeps every base, adapter and oracle result that was made once."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cases
import hypothesis
import oracle
import pytest
import torch
from hub.client import point_client
from hub.fixtures import hub as hub
from hub.server import LoopbackHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
# What numpy was seen to do on this machine is tried anew, and the user's own record left alone.
_CACHE = tempfile.mkdtemp(prefix="adapterpack-cache-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


class Workshop:
    """Makes each thing once. What it hands out is read-only by agreement: copy it before you change it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._oracle: dict[Any, oracle.Merged] = {}

    def base(self, kind: str = "llama", dtype: str = "f32", shard: str | None = None, **how: Any) -> Path:
        name = "-".join([kind, dtype, shard or "", *(f"{k}={v}" for k, v in sorted(how.items()))])
        path = self.root / "bases" / name
        if not path.exists():
            oracle.save_base(oracle.tiny_model(kind, cases.DTYPES[dtype], **how), path, shard)
        return path

    def base_of(self, case: cases.Case, dtype: str = "f32") -> Path:
        return self.base(case.kind, dtype, tie=case.tie, bias=case.bias, **case.over)

    def adapter(self, case: cases.Case, dtype: str = "f32") -> Path:
        path = self.root / "adapters" / dtype / case.name
        if not path.exists():
            oracle.make_adapter(
                path,
                case.config(),
                case.kind,
                cases.DTYPES[dtype],
                scale=case.scale,
                autocast=case.autocast,
                post=case.post,
                base_dir=self.base_of(case, dtype),
            )
        return path

    def pair(self, name: str, dtype: str = "f32") -> tuple[Path, Path]:
        """(adapter, base) of a case."""
        case = cases.BY_NAME[name]
        return self.adapter(case, dtype), self.base_of(case, dtype)

    def peft_merge(self, base: Path, adapter: Path, safe_merge: bool = False) -> oracle.Merged:
        key = base, adapter, safe_merge
        if key not in self._oracle:
            self._oracle[key] = oracle.peft_merge(base, adapter, safe_merge=safe_merge)
        return self._oracle[key]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


class Files:
    """Reading and changing adapter and model directories."""

    @staticmethod
    def tensors(directory: Path) -> dict[str, torch.Tensor]:
        adapter = directory / "adapter_model.safetensors"
        if adapter.exists():
            return load_file(adapter)
        found: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("model*.safetensors")):
            found |= load_file(file)
        return found

    @staticmethod
    def metadata(directory: Path) -> dict[str, str]:
        with safe_open(directory / "adapter_model.safetensors", "pt") as f:
            return dict(f.metadata())

    @staticmethod
    def config(directory: Path) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
        return loaded

    @staticmethod
    def edited(
        source: Path,
        destination: Path,
        tensors: Mapping[str, torch.Tensor | None] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """A copy of an adapter with other tensors (None removes one) and other config fields."""
        destination.mkdir(parents=True)
        changed = Files.tensors(source) | dict(tensors or {})
        kept = {k: v.contiguous() for k, v in changed.items() if v is not None}
        save_file(kept, destination / "adapter_model.safetensors", metadata=Files.metadata(source))
        (destination / "adapter_config.json").write_text(json.dumps(Files.config(source) | dict(config or {})))
        return destination

    @staticmethod
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        """The same dtype, shape and bits."""
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)

    @staticmethod
    def header(file: Path) -> bytes:
        data = file.read_bytes()
        return data[: 8 + int.from_bytes(data[:8], "little")]


def bits(t: torch.Tensor) -> bytes:
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if t.numel() else b""


@pytest.fixture(scope="session")
def files() -> Files:
    return Files()


@pytest.fixture
def loopback(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A Hub of this test's own that this process talks to, with a token that may write, without our waits."""
    from adapterpack.hub import client

    point_client(monkeypatch, hub, HF_HUB_CACHE=str(tmp_path / "cache"))
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub
