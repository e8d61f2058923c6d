"""Makes huggingface_hub talk to a loopback Hub: in this process, or in one of its own.

The client reads its environment when it is imported, and other tests of the same run import it first. So setting
variables is not enough for calls in this process. `point_client` sets them, runs the client's own `constants.py` once
more under them, on the side, and puts every constant that came out different into the imported module, and wherever
else it was copied under the same name. Nothing is listed by hand: a constant that a later version adds is found too.
What holds on to an old endpoint (the `HfApi` instance behind the module's functions, cached file systems, the Xet
session) is replaced or dropped. All of it is undone with the test's `monkeypatch`.

A process of its own (`run_client`) is the plain way, half a second slower, and the one to take where what is tested
is the client's import, what is printed, or what another program does.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from hub.server import LoopbackHub


def point_client(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, **more: str) -> None:
    """Sets the environment and the imported client's constants to `hub.env()` and `more` (HF_HUB_OFFLINE="1")."""
    # Imported before anything is set: what is first imported under a test's settings would keep them afterwards.
    for part in ("hf_api", "hf_file_system", "utils._xet"):
        importlib.import_module(f"huggingface_hub.{part}")
    constants = importlib.import_module("huggingface_hub.constants")
    for name in hub.cleared:
        monkeypatch.delenv(name, raising=False)
    for name, value in (hub.env() | more).items():
        monkeypatch.setenv(name, value)
    fresh = _run_again(constants)
    for name, value in vars(fresh).items():
        old = getattr(constants, name, None)
        if name.startswith("__") or isinstance(value, ModuleType) or callable(value) or value == old:
            continue
        monkeypatch.setattr(constants, name, value)
        for module in _modules():
            if module is not constants and name in vars(module) and vars(module)[name] == old:
                monkeypatch.setattr(module, name, value)
    _let_go(monkeypatch, hub.url)


def _run_again(constants: ModuleType) -> ModuleType:
    """The module as it would be if it was imported now."""
    assert constants.__spec__ is not None
    spec = importlib.util.spec_from_file_location(constants.__name__, constants.__spec__.origin)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


def _modules() -> list[ModuleType]:
    roots = ("huggingface_hub", "transformers.utils", "peft.utils", "adapterpack")
    return [m for name, m in list(sys.modules.items()) if m is not None and name.startswith(roots)]


def _let_go(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What keeps an endpoint or a cache directory that it saw before."""
    from huggingface_hub import hf_api, hf_file_system
    from huggingface_hub.utils import _xet

    monkeypatch.setattr(hf_api.api, "endpoint", url)
    hf_file_system.HfFileSystem.clear_instance_cache()
    # The next use makes a new session, which reads HF_HOME again.
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())


def run_client(hub: LoopbackHub, code: str, *arguments: str, **env: str) -> str:
    """What a new Python process prints that runs `code` with the Hub's environment and `env` (HF_TOKEN=hub.token)."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=hub.child_env(HF_HUB_DISABLE_PROGRESS_BARS="1", **env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
