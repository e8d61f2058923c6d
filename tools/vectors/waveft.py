"""formats/waveft: WaveFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from peft import WaveFTConfig

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64
from vectors.fourierft import BASE, hostile, places
from vectors.hostile import Cases, Q, directory, ramp

FORMAT = "waveft"
PEFT_TYPES = ("WAVEFT",)
_ROOT = math.sqrt(3)
LOWPASS = {
    "db1": [1 / math.sqrt(2)] * 2,
    # Daubechies' four in closed form.
    "db2": [x / (4 * math.sqrt(2)) for x in (1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT)],
}


def waveft(**kw: Any) -> Callable[[], Any]:
    return lambda: WaveFTConfig(**{"n_frequency": 20, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


def spread(filter_: list[float], count: int) -> np.ndarray:
    """The matrix that puts a zero behind each of `count` numbers and convolves with the filter."""
    made = np.zeros((2 * (count - 1) + len(filter_), count))
    for i in range(count):
        made[2 * i : 2 * i + len(filter_), i] = filter_
    return made


def inverse(coefficients: np.ndarray, low: list[float]) -> np.ndarray:
    """One level back, from quarters; without the borders that are not whole."""
    high = [(-1) ** i * x for i, x in enumerate(low[::-1])]
    rows, columns = (n // 2 for n in coefficients.shape)
    total = 0.0
    for top, left, down, across in ((0, 0, low, low), (0, 1, high, low), (1, 0, low, high), (1, 1, high, high)):
        band = coefficients[top * rows : (top + 1) * rows, left * columns : (left + 1) * columns]
        total = total + spread(down, rows) @ band @ spread(across, columns).T
    edge = len(low) - 2
    return np.asarray(total)[edge : len(total) - edge, edge : total.shape[1] - edge]


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "waveft"
    tail = ".waveft_spectrum"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        spectrum, (out, into) = f64(tensors.pop(key)), ctx.logical(module)
        rows, columns = divmod(places(out * into, len(spectrum), config["random_loc_seed"]), into)
        if not config["use_idwt"]:
            delta = np.zeros((out, into))
            delta[rows, columns] = spectrum
        else:
            low = LOWPASS[config["wavelet_family"].replace("sym2", "db2")]
            wide = [n + len(low) - 2 + (n + len(low)) % 2 for n in (out, into)]
            padded = np.zeros(wide)
            padded[rows + (wide[0] - out) // 2, columns + (wide[1] - into) // 2] = spectrum
            made = inverse(padded, low)
            first, start = (made.shape[0] - out) // 2, (made.shape[1] - into) // 2
            delta = made[first : first + out, start : start + into]
        ctx.add(f"{module}.weight", ctx.stored(module, delta * config["scaling"]))


CASES = [
    Case("haar", waveft(), "db1, linear layers of unequal shapes", scale=0.3),
    Case("db2", waveft(wavelet_family="db2", random_loc_seed=3), "filters that need room at the borders", scale=0.3),
    Case("direct", waveft(use_idwt=False), "use_idwt false: the coefficients are the change", scale=0.3),
    Case("gpt2", waveft(target_modules=GPT2_TM, wavelet_family="sym2"), "Conv1D", kind="gpt2", scale=0.3),
    Case(
        "odd",
        waveft(target_modules=["lin"], wavelet_family="db2"),
        "odd numbers of rows and columns",
        kind="custom",
        over={"layers": [["lin", "Linear", {"in_features": 7, "out_features": 9}]]},
        scale=0.3,
    ),
    Case("proportional", waveft(proportional_parameters=True), "as many frequencies as the shape asks", scale=0.3),
]
CONFIG = {"peft_type": "WAVEFT", "n_frequency": 4, "target_modules": ["q_proj"]}


def invalid(cases: Cases) -> None:
    key = f"{PFX}{Q}.waveft_spectrum"
    hostile(cases, CONFIG, key)
    for family in ("coif5", "db11", 7):
        files = directory({**CONFIG, "wavelet_family": family}, {key: ramp(4)}) | BASE
        cases.add(f"wavelet-{family}", files, "check", finding="unknown-wavelet")
        how: dict[str, Any] = {"dtype": "bf16", "base": "base"}
        message = "cannot reconstruct with it"
        cases.add(f"wavelet-{family}-convert", files, "convert", error="unsupported", message=message, **how)
