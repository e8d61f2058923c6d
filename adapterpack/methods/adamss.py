"""AdaMSS (adaptive multi-subspaces): rows of the base fall into clusters, each of which has a low-rank update.

    delta [W, b] = scatter(B_i A_i N),   N (r, in) or (r, in + 1) with the bias as its last column

N, A_i and B_i are in the file. Which rows belong to cluster i is not: PEFT finds it again on loading, by KMeans on
the left singular vectors of the base (a randomised SVD from `random_seed`). Signs of singular vectors do not move
clusters. Reference: peft/tuners/adamss/utils.py (`slice_pca`, `clustering_Z`) and layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, floats, positive
from adapterpack.methods._of_base import linear_shape, lowrank_svd, seed
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "ADAMSS"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("adamss_", {"newB": "adamss_newB", "A.*": "adamss_A.*", "B.*": "adamss_B.*"})
_KMEANS_SEED, _KMEANS_STEPS = 123456789, 10
_ANOTHER_SPACE = 0.05
"""How much of N may lie outside the singular vectors that the base gives, relatively: 16-bit bases round N."""


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "adamss", "adamss")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    settings = _settings(a.config)
    for module, params in a.modules.items():
        sizes = _Sizes.of(module, params)
        if request.shapes is None:
            # Whether the last column is the bias's only the base can tell.
            yield TransformChange(
                module=module, params=params, shape=(sizes.out, 0), transform=_unknown, settings=settings
            )
            continue
        shape = linear_shape(a, module, request, out=sizes.out)
        biased = request.shapes.has(f"{module}.bias")
        if sizes.columns != shape[1] + biased:
            raise WrongBase(
                f"{module}: adamss_newB has {sizes.columns} columns for {shape[1]} inputs and"
                f" {'a' if biased else 'no'} bias in the base",
                hint="is it the base that was trained on?",
            )
        names = [f"{module}.weight", *([f"{module}.bias"] if biased else [])]
        rows = _Rows(module, sizes, settings, tuple(request.shapes.tensor(n) for n in names))
        for part in ("weight", "bias")[: len(names)]:
            yield TransformChange(
                module=module,
                part=part,
                params=params,
                shape=shape if part == "weight" else shape[:1],
                transform=partial(_changed, rows, part),
                settings=settings,
                reads=frozenset(names),
            )


def _settings(config: Mapping[str, Any]) -> Mapping[str, int]:
    """What decides the clusters. Raises InvalidFile for what is no number."""
    sizes = {"r": positive(config, "r", 100), "clusters": positive(config, "num_subspaces", 5)}
    return {**sizes, "seed": seed(config, "random_seed")}


@dataclass(frozen=True)
class _Sizes:
    """What the tensors of a module say.

    Attributes:
        columns: Of N: input features, and one for the bias.
        rows: Of each cluster.
        rank: Of the SVD.
    """

    columns: int
    rows: tuple[int, ...]
    rank: int

    @property
    def out(self) -> int:
        return sum(self.rows)

    @classmethod
    def of(cls, module: str, params: Mapping[str, Param]) -> _Sizes:
        count = max(1, sum(n.startswith("A.") for n in params))
        names = tuple(f"{side}.{i}" for i in range(count) for side in "AB")
        (projection,), pairs = floats(module, params, ("newB",)), floats(module, params, names)
        more = sorted(params.keys() - {"newB", *names})
        if more:
            raise InvalidFile(f"{module} has {params[more[0]].key} without the others of its kind")
        shapes = [t.shape for t in pairs]
        fits = len(projection.shape) == 2
        for a, b in zip(shapes[::2], shapes[1::2], strict=True):
            fits = fits and len(a) == len(b) == 2 and a[1] == projection.shape[0] and a[0] == b[1] and b[0] > 0
        if not fits:
            shown = ", ".join(f"{n} {params[n].tensor.shape}" for n in ("newB", *names[:4]))
            raise InvalidFile(f"{module}: these shapes do not fit together: {shown}")
        return cls(projection.shape[1], tuple(s[0] for s in shapes[1::2]), projection.shape[0])


@dataclass
class _Rows:
    """Which rows of a module's weight belong to which cluster, found when they are first asked for.

    Attributes:
        base: The weight, and the bias if there is one, as the base has them.
    """

    module: str
    sizes: _Sizes
    settings: Mapping[str, int]
    base: tuple[Tensor, ...]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _found: Array | None = None

    def places(self, xp: Backend, projection: Tensor | Array) -> Array:
        """(out,): the row that each row of the stacked clusters belongs to.

        Raises:
            WrongBase: the base's clusters are not the adapter's.
        """
        with self._lock:
            if self._found is None:
                with xp.one_thread():
                    self._found = self._find(xp, xp.f32(projection).cpu()).to(xp.device)
            return self._found

    def _find(self, xp: Backend, projection: Array) -> Array:
        torch = xp.torch
        weight, *bias = (xp.f32(t).cpu() for t in self.base)
        stacked = torch.cat([weight, bias[0][:, None]], dim=1) if bias else weight
        rank = min(self.settings["r"], *stacked.shape)
        if rank != self.sizes.rank:
            raise InvalidFile(f"{self.module}: r is {rank} by the config, {self.sizes.rank} by the tensors")
        u, _, vh = lowrank_svd(torch, stacked, rank, 2, self.settings["seed"])
        outside = projection - (projection @ vh.T) @ vh
        clusters = _kmeans(u.contiguous().numpy(), min(self.settings["clusters"], len(u)))
        sizes = tuple((clusters == i).sum() for i in range(len(self.sizes.rows)))
        hint = "is it the base that was trained on? PEFT, too, finds the clusters again when it loads it"
        if sizes != self.sizes.rows:
            raise WrongBase(
                f"the rows of {self.module}.weight fall into clusters of {_list(sizes)}, the adapter has"
                f" {_list(self.sizes.rows)} rows",
                hint=hint,
            )
        if not float(outside.norm()) <= _ANOTHER_SPACE * float(projection.norm()):
            raise WrongBase(f"{self.module}: adamss_newB are not the singular vectors of the base", hint=hint)
        found = torch.from_numpy(clusters)
        return torch.cat([torch.where(found == i)[0] for i in range(len(sizes))])


def _list(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "")


def _kmeans(rows: Any, clusters: int) -> Any:
    """The cluster of each row, int. Raises Unsupported without scikit-learn."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise Unsupported(
            "AdaMSS finds its clusters by KMeans of scikit-learn, which is not installed",
            hint="pip install 'adapterpack[methods]'",
        ) from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = KMeans(
            n_clusters=clusters, init="random", n_init=1, max_iter=_KMEANS_STEPS, random_state=_KMEANS_SEED
        )
        return means.fit_predict(rows.astype("float32"))


def _unknown(m: Maths, w: Array) -> Array:
    raise WrongBase("AdaMSS takes the base to know which rows it changes", hint="--base BASE")


def _changed(rows: _Rows, part: str, m: Maths, w: Array) -> Array:
    chunks = [m[f"B.{i}"] @ m[f"A.{i}"] @ m["newB"] for i in range(len(rows.sizes.rows))]
    delta = m.torch.zeros_like(m.torch.cat(chunks))
    delta[rows.places(m.xp, m["newB"])] = m.torch.cat(chunks)
    into = rows.base[0].shape[1]
    delta = delta[:, :into] if part == "weight" else delta[:, into]
    return w + m.lift(m.rounded(delta))


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _Sizes.of(module, params).rank for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    settings = _settings(a.config)
    r, clusters = settings["r"], settings["clusters"]
    for module, params in a.modules.items():
        try:
            sizes = _Sizes.of(module, params)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
            continue
        if sizes.rank > r or len(sizes.rows) != min(clusters, sizes.out):
            yield Finding(
                "config-mismatch",
                module,
                f"r {r} and {clusters} subspaces by the config, {sizes.rank} and {len(sizes.rows)} by the tensors",
                "train or save the adapter again",
            )


edges: Mapping[str, tuple[Edge, ...]] = {"adamss": ()}
