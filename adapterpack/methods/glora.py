"""GLoRA (Chavan et al. 2023, arXiv 2306.07967): the weight scaled and moved, the bias too, with a part of the weight.

    W' = W + W * A + B        b' = b + b * D + E + W C

Each path is a product of two factors, a vector, a constant or nothing, as the config says; without a bias in the base
there are no C, D and E. PEFT computes all of it in the dtype of the base. Reference: peft/tuners/glora/layer.py
(`update_layer`, `merge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, WrongBase
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, floats
from adapterpack.methods._of_base import choice, linear_shape, pair_findings
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "GLORA"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_PATHS = "ABCDE"
_WEIGHT, _BIAS = "AB", "CDE"
keys = KeyTable("glora_", {f"{p}.{n}": f"glora_{p}.{n}" for p in _PATHS for n in ("Xd", "Xu", "X", "zeros")})
_FORMS = {
    "A": ("config_A_B", "lora", ("lora", "vector", "constant", "none")),
    "B": ("config_A_B", "lora", ("lora", "vector", "constant", "none")),
    "C": ("config_C", "lora", ("lora", "vector", "none")),
    "D": ("config_D_E", "constant", ("vector", "constant", "none")),
    "E": ("config_D_E", "constant", ("vector", "constant", "none")),
}
"""Path to the config's field for its form, PEFT's default, and the forms that PEFT knows."""
_OF_FORM = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ("zeros",)}


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "glora", "glora")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        layer = _Layer(a, module, params)
        shape = linear_shape(a, module, request, out=layer.out, into=layer.into)
        biased = layer.biased if request.shapes is None else request.shapes.has(f"{module}.bias")
        layer.check(shape, biased)
        own = params if not biased else {n: p for n, p in params.items() if n[0] in _WEIGHT}
        yield TransformChange(
            module=module,
            params=own,
            shape=shape,
            transform=partial(_weight, layer.forms),
        )
        if biased:
            weight = f"{module}.weight"
            yield TransformChange(
                module=module,
                part="bias",
                params={n: p for n, p in params.items() if n[0] in _BIAS},
                shape=shape[:1],
                transform=partial(_bias, layer.forms),
                given={} if request.shapes is None else {"weight": request.shapes.tensor(weight)},
                reads=frozenset({weight}),
            )


class _Layer:
    """The paths of one module, held against the config.

    Attributes:
        forms: Path to its form.
        biased: Do the tensors speak of a bias? (Where no path of it does anything nothing is lost.)
        out, into: Features, as far as the tensors say; else 0.
    """

    def __init__(self, a: Adapter, module: str, params: Mapping[str, Param]) -> None:
        self._module, self._params = module, params
        self.forms: dict[str, str] = {}
        self.biased = any(f"{p}.zeros" not in params for p in _BIAS)
        for path, (field, default, known) in _FORMS.items():
            form = choice(a.config, field, default, known)
            if path in _BIAS and not self.biased:
                form = "none"
            wanted = {f"{path}.{n}" for n in _OF_FORM[form]}
            found = {n for n in params if n[0] == path}
            floats(module, params, tuple(found))
            if wanted != found:
                has = ", ".join(sorted(found)) or "nothing"
                raise InvalidFile(
                    f"{module}: {field} says that {path} is {form!r}, the file has {has}",
                    hint="PEFT would leave what it lacks untrained: save the adapter again",
                )
            self.forms[path] = form
        self.out = self._dim("A", 0) or self._dim("D", 0)
        self.into = (0 if self.forms["A"] in ("vector", "constant") else self._dim("A", -1)) or self._dim("C", 0)

    def _dim(self, path: str, axis: int) -> int:
        """A dimension of what the path gives; 0 for a constant."""
        form = self.forms[path]
        if form == "constant":
            return 0
        name = "Xd" if form == "lora" and axis == 0 else _OF_FORM[form][-1]
        shape = self._params[f"{path}.{name}"].tensor.shape
        return shape[axis] if shape else 0

    def check(self, shape: tuple[int, int], biased: bool) -> None:
        """Raise InvalidFile where the shapes do not fit the layer's, WrongBase for a bias that the base lacks."""
        out, into = shape
        if self.biased and not biased:
            raise WrongBase(
                f"the adapter changes {self._module}.bias, which the base does not have",
                hint="is it the base that was trained on?",
            )
        whole: dict[str, Shape] = {"A": (out, into), "B": (out, into), "C": (into, 1), "D": (out,), "E": (out,)}
        for path, form in self.forms.items():
            found = [self._params[f"{path}.{n}"].tensor.shape for n in _OF_FORM[form]]
            wanted = whole[path]
            if form == "lora":
                fits = all(len(s) == 2 for s in found) and found[0][1] == found[1][0] > 0
                fits = fits and _same((found[0][0], found[1][1]), wanted)
            elif form == "constant":
                fits = found == [(1,)]
            else:
                fits = _same(found[0], (out, 1) if path in _WEIGHT and form == "vector" else wanted)
            if not fits:
                raise InvalidFile(f"{self._module}: {path} of shape {found} does not fit (out, in) = ({out}, {into})")

    @property
    def rank(self) -> int | None:
        found = [self._params[f"{p}.Xu"].tensor.shape for p, form in self.forms.items() if form == "lora"]
        return found[0][0] if found and found[0] else None


def _same(found: Shape, wanted: Shape) -> bool:
    """A wanted dimension of 0 is not known."""
    return len(found) == len(wanted) and all(w in (f, 0) for f, w in zip(found, wanted, strict=True))


def _path(m: Maths, path: str, form: str) -> Array:
    """What a path gives, in the dtype of the base."""
    if form == "lora":
        return m.rounded(m[f"{path}.Xd"] @ m[f"{path}.Xu"])
    values = m[f"{path}.{_OF_FORM[form][0]}"]
    return m.rounded(values[0] if form == "constant" else values)


def _weight(forms: Mapping[str, str], m: Maths, w: Array) -> Array:
    # Each operation rounds to the dtype of the base, as it does in PEFT.
    w = m.rounded(w)
    a, b = (_path(m, p, forms[p]) for p in _WEIGHT)
    return w + (w * a + b)


def _bias(forms: Mapping[str, str], m: Maths, bias: Array) -> Array:
    bias, w = m.rounded(bias), m.rounded(m["weight"])
    c, d, e = (_path(m, p, forms[p]) for p in _BIAS)
    return bias + (bias * d + e + m.torch.matmul(w, c).squeeze(-1))


def ranks(a: Adapter) -> Mapping[str, int]:
    found = {module: _Layer(a, module, params).rank for module, params in a.modules.items()}
    return {module: rank for module, rank in found.items() if rank is not None}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    def rank(module: str, params: Mapping[str, Param]) -> int | None:
        layer = _Layer(a, module, params)
        layer.check((layer.out, layer.into), layer.biased)
        return layer.rank

    yield from pair_findings(a, rank, 8)


edges: Mapping[str, tuple[Edge, ...]] = {"glora": ()}
