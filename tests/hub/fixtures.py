"""The fixture `hub`, for all tests: `tests/conftest.py` imports it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hub.client import point_client
from hub.server import LoopbackHub


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that runs, with this process's client pointed at it and logged out.

    Give a token where one is needed: `token=hub.token`, or `monkeypatch.setenv("HF_TOKEN", hub.token)`. For other
    settings of the client call `hub.client.point_client(monkeypatch, hub, HF_HUB_OFFLINE="1")`. When the test is
    over, it fails if the storage host saw a token of the Hub, or the Hub itself had an error.
    """
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as running:
        point_client(monkeypatch, running)
        yield running
