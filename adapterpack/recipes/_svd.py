"""Factors that the base's weights give, by a randomised SVD whose bits are those of a library and a machine."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Self

from adapterpack import limits
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.recipes._base import Recipe
from adapterpack.recipes._base import integer as json_integer
from adapterpack.recipes._base import only as json_only
from adapterpack.recipes._base import shape as json_shape
from adapterpack.recipes._base import text as json_text
from adapterpack.tensor import BF16, DTYPES, F16, F32, DType, Shape, Tensor, from_numpy, round_values

if TYPE_CHECKING:
    from adapterpack.tensor import Array

INPUTS, OUTPUTS = "inputs", "outputs"
_SEED, _ITERATIONS = 42, 10
_MOST_THREADS = 1024
_threads = threading.Lock()
"""How many threads BLAS takes is one number for the whole process."""


@dataclass(frozen=True)
class Factored:
    """A weight of the base and its two factors.

    Attributes:
        name: The module.
        a: Key of A, (r, in).
        b: Key of B, (out, r).
        shape: (out, in) of the weight.
    """

    name: str
    a: str
    b: str
    shape: Shape
    rank: int


@dataclass(frozen=True)
class SvdRecipe(Recipe):
    """`TruncatedSVD(n_components=r, n_iter=10, random_state=42)` of W^T (LoRA-XS, utils/initialization_utils.py).

    With its components V, (r, out): A = (W^T V^T)^T, which holds the singular values, and B = V^T.

    Attributes:
        signs: The entry of largest magnitude is positive in each row of A (`inputs`: scikit-learn before 1.5) or in
            each column of B (`outputs`).
        threads: Of the BLAS: large products are summed in another order by another number.
        through: dtype of W in training, to which the factors were rounded.
        stored: dtype of the factors.
        libraries: What computed them, name to version: for people.
    """

    draws: tuple[Factored, ...]
    signs: str
    threads: int
    through: DType
    stored: DType
    libraries: Mapping[str, str]

    name = "truncated-svd"
    generator = "scikit-learn"
    takes_base = True

    @property
    def outputs(self) -> list[tuple[str, DType, Shape]]:
        pairs = ([(d.a, (d.rank, d.shape[1])), (d.b, (d.shape[0], d.rank))] for d in self.draws)
        return [(name, self.stored, shape) for pair in pairs for name, shape in pair]

    def factors(self, d: Factored, w: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one weight, held against their digests where those were recorded.

        Args:
            w: (out, in), as the base has it.

        Raises:
            InvalidFile: a digest does not agree.
            WrongBase: the weight has another shape.
            Unsupported: without scikit-learn; a weight that is too large, or that it refuses.
        """
        if w.shape != d.shape:
            raise WrongBase(f"{d.name}.weight has shape {w.shape}, and the factors are those of one of {d.shape}")
        if w.dtype not in (F32, BF16, F16) or w.numel > limits.RECIPE_ELEMENTS:
            raise Unsupported(f"{d.name}.weight, {w.dtype} {w.shape}, is not one to take an SVD of here")
        values = round_values(w.numpy().astype("float32"), self.through)
        a, b = self._signed(*_truncated_svd(d, values, self.threads))
        # As torch rounds: from f64, in which scikit-learn computes on 16-bit values, by way of f32.
        rounded = (round_values(round_values(f, F32), self.through).astype("float32") for f in (a, b))
        found_a, found_b = (from_numpy(round_values(f, self.stored)) for f in rounded)
        for key, tensor in ((d.a, found_a), (d.b, found_b)):
            if self.digests and tensor.digest() != self.digests[key]:
                raise self._another(key)
        return found_a, found_b

    def _signed(self, a: Array, b: Array) -> tuple[Array, Array]:
        import numpy as np

        deciding = a if self.signs == INPUTS else b.T
        largest = np.take_along_axis(deciding, np.abs(deciding).argmax(axis=1)[:, None], axis=1)
        turn = np.where(largest < 0, -1, 1).astype(a.dtype)
        return a * turn, b * turn.T

    def _another(self, key: str) -> InvalidFile:
        here, _ = at_hand()
        recorded, now = (", ".join(f"{n} {v}" for n, v in sorted(of.items())) for of in (self.libraries, here))
        return InvalidFile(
            f"{key} is not what was recorded: this machine or library computes another SVD, or the base is another",
            hint=f"adapterpack convert --to loraxs where it was made, with {recorded:.300} (here: {now:.300})",
        )

    def _fields(self) -> dict[str, Any]:
        return {
            "draws": [
                {"name": d.name, "A": d.a, "B": d.b, "shape": list(d.shape), "rank": d.rank} for d in self.draws
            ],
            "iterations": _ITERATIONS,
            "seed": _SEED,
            "signs": self.signs,
            "threads": self.threads,
            "through": self.through.name,
            "stored": self.stored.name,
            "libraries": dict(self.libraries),
        }

    @classmethod
    def read(cls, r: Mapping[str, Any]) -> Self:
        json_only(r, "draws", "iterations", "seed", "signs", "threads", "through", "stored", "libraries")
        if (json_integer(r["iterations"]), json_integer(r["seed"])) != (_ITERATIONS, _SEED):
            raise ValueError("iterations or a seed that no LoRA-XS is made with")
        threads = json_integer(r["threads"])
        if r["signs"] not in (INPUTS, OUTPUTS) or not 0 < threads <= _MOST_THREADS:
            raise ValueError("unknown signs, or a number of threads that is none")
        drawn = []
        for d in r["draws"]:
            shape, rank = json_shape(d["shape"], 2), json_integer(d["rank"])
            if not 0 < rank <= min(shape):
                raise ValueError(f"a part of rank {rank} of {shape}")
            drawn.append(Factored(json_text(d["name"]), json_text(d["A"]), json_text(d["B"]), shape, rank))
        libraries = {json_text(k): json_text(v) for k, v in r["libraries"].items()}
        return cls(tuple(drawn), r["signs"], threads, DTYPES[r["through"]], DTYPES[r["stored"]], libraries)


def ways(draws: tuple[Factored, ...], stored: DType) -> Iterator[SvdRecipe]:
    """The recipes by which factors of this dtype may have been made, likely ones first."""
    libraries, most = at_hand()
    for through in (F32, F16):
        for threads in dict.fromkeys((most, 1)):
            for signs in (OUTPUTS, INPUTS):
                yield SvdRecipe(draws, signs, threads, through, stored, libraries)


def at_hand() -> tuple[Mapping[str, str], int]:
    """Versions of what computes the SVD here, and how many threads its BLAS takes. Raises Unsupported."""
    _estimator()
    from threadpoolctl import threadpool_info

    blas = [i for i in threadpool_info() if i["user_api"] == "blas"]
    names = dict.fromkeys(f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip() for i in blas)
    versions = {n: metadata.version(n) for n in ("numpy", "scipy", "scikit-learn")}
    most = max((i["num_threads"] for i in blas), default=1)
    return {**versions, "blas": ", ".join(sorted(names))}, min(most, _MOST_THREADS)


def _estimator() -> Any:
    """TruncatedSVD. Raises Unsupported without scikit-learn."""
    try:
        from sklearn.decomposition import TruncatedSVD
    except ImportError as e:
        raise Unsupported(
            "A and B of LoRA-XS come from TruncatedSVD of scikit-learn, which is not installed",
            hint="pip install 'adapterpack[methods]'",
        ) from e
    return TruncatedSVD


def _truncated_svd(d: Factored, w: Array, threads: int) -> tuple[Array, Array]:
    """(r, in) and (out, r), in the dtype that scikit-learn computes in."""
    from threadpoolctl import threadpool_limits

    svd = _estimator()(n_components=d.rank, n_iter=_ITERATIONS, random_state=_SEED)
    with warnings.catch_warnings(), _threads, threadpool_limits(threads, "blas"):
        warnings.simplefilter("ignore")
        try:
            # The transposed view, as the reference has it: BLAS may sum a copy in another order.
            svd.fit(w.T)
            return svd.transform(w.T).T, svd.components_.T
        except ValueError as e:
            raise Unsupported(f"scikit-learn takes no SVD of {d.name}.weight: {str(e).splitlines()[0]:.200}") from e
