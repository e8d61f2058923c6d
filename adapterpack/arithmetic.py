"""Where a merge computes: numpy where it gives PEFT's bits or bits do not matter, else torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack

from adapterpack import exactness, plan, vectormath
from adapterpack.backend import Backend, NumpyBackend, TorchBackend


class Disproved(Exception):
    """numpy gives other bits than torch: what it computed must not stay."""


class Arithmetic:
    """The choice for one merge.

    Args:
        p: What is to be computed.
        device: As the user said.
        once: Do bits not matter, for it is f64 and one rounding?
    """

    def __init__(self, p: plan.Plan, device: str, *, once: bool) -> None:
        self._questions, self._torch = p.questions(), p.torch
        self._mixes = p.mixes
        self.device = "cpu" if device == "auto" else device
        self._once = once
        self._proof: exactness.Proof | None = None

    @property
    def name(self) -> str:
        """What it will be, if nothing is disproved."""
        return f"torch {self.device}" if self._numpy_will_do() is False else NumpyBackend.name

    def _numpy_will_do(self) -> bool | None:
        """None: it has not been tried yet."""
        if self._torch or self.device != "cpu":
            return False
        known = None if self._once else exactness.numpy_known(self._questions)
        if known is None and self._mixes and not vectormath.available():
            return False
        if self._once:
            return True
        # Where torch is at hand already there is nothing to gain by trying.
        return False if known is None and "torch" in sys.modules else known

    def start(self, stack: ExitStack) -> Future[Backend]:
        """numpy where it will do, or may: then a proof is begun; else torch. Imported while other work goes on.

        Args:
            stack: What is set for it, is set back when this is closed.
        """
        will_do = self._numpy_will_do()
        if will_do is False:
            return self.torch(stack)
        if will_do is None:
            self._proof = exactness.Proof(self._questions)
            stack.callback(self._proof.close)
        return _begin(stack, self._numpy)

    def _numpy(self) -> Backend:
        if self._mixes:
            vectormath.available()  # Loads it.
        return NumpyBackend()

    def torch(self, stack: ExitStack) -> Future[Backend]:
        """torch, whatever numpy would do."""
        self._proof = None
        return _begin(stack, lambda: TorchBackend(self.device))

    def believe(self) -> None:
        """Raise Disproved if numpy has turned out to give other bits than torch."""
        if self._proof is not None and not self._proof.succeeds():
            raise Disproved


def _begin(stack: ExitStack, load: Callable[[], Backend]) -> Future[Backend]:
    """Import a library in a thread of its own."""
    ready: Future[Backend] = Future()

    def run() -> None:
        try:
            xp = load()
            stack.enter_context(xp.one_thread())
            ready.set_result(xp)
        except BaseException as e:
            ready.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    # Whatever happens meanwhile, what it sets is set back.
    stack.callback(ready.exception)
    return ready
