"""formats/fourierft: FourierFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import FourierFTConfig

from vectors.common import GPT2_TM, PFX, Case, Context, Tensors, f64, first_match, mersenne
from vectors.hostile import Cases, Q, directory, ramp, text

FORMAT = "fourierft"
PEFT_TYPES = ("FOURIERFT",)


def fourierft(**kw: Any) -> Callable[[], Any]:
    return lambda: FourierFTConfig(**{"n_frequency": 20, "target_modules": ["q_proj", "k_proj", "down_proj"], **kw})


def places(size: int, count: int, seed: int) -> np.ndarray:
    """The first of a permutation, by shuffling all of it from the front."""
    order = list(range(size))
    for i, word in enumerate(mersenne(seed).random_raw(size - 1).tolist()):
        j = i + word % (size - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order[:count])


def scattered(ctx: Context, module: str, spectrum: np.ndarray, seed: int) -> np.ndarray:
    """(out, in), with the spectrum at the places that the seed chooses."""
    out, into = ctx.logical(module)
    dense = np.zeros(out * into)
    dense[places(out * into, len(spectrum), seed)] = spectrum
    return dense.reshape(out, into)


def expected(tensors: Tensors, config: dict[str, Any], base: Tensors, ctx: Context) -> None:
    ctx.facts["encoding"] = "fourierft"
    tail = ".fourierft_spectrum"
    for key in sorted(k for k in tensors if k.endswith(tail)):
        module = key.removesuffix(tail).removeprefix(PFX)
        spectrum = f64(tensors.pop(key))
        assert len(spectrum) == first_match(config["n_frequency_pattern"], module, config["n_frequency"])
        dense = scattered(ctx, module, spectrum, config["random_loc_seed"])
        ctx.add(f"{module}.weight", ctx.stored(module, np.fft.ifft2(dense).real * config["scaling"]))


CASES = [
    Case("linear", fourierft(), "linear layers of unequal shapes", scale=0.3),
    Case(
        "gpt2", fourierft(target_modules=GPT2_TM, random_loc_seed=3), "Conv1D, another seed", kind="gpt2", scale=0.3
    ),
    Case("patterns", fourierft(n_frequency_pattern={"k_proj": 5}, scaling=2.5), "n_frequency_pattern", scale=0.3),
    Case("bf16-base", fourierft(), "a bfloat16 base", dtype="bfloat16", scale=0.3),
]
CONFIG = {"peft_type": "FOURIERFT", "n_frequency": 4, "target_modules": ["q_proj"]}
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}
BASE = {"base/config.json": text(LLAMA)}


def hostile(cases: Cases, config: dict[str, Any], key: str) -> None:
    """What FourierFT and WaveFT have in common."""

    def made(count: int = 4, **more: Any) -> Any:
        # No values that bfloat16 has too: what a cast does not change is not measured.
        return directory({**config, **more}, {key: ramp(count) / 3}) | BASE

    how: dict[str, Any] = {"dtype": "bf16", "base": "base"}
    cases.add("no-base", made(), "convert", error="wrong-base", message="needs the shapes", dtype="bf16")
    many = made(65, n_frequency=65)
    cases.add("more-than-places", many, "convert", error="invalid", message="65 values for 64 places", **how)
    matrix = directory(config, {key: ramp(2, 2) / 3}) | BASE
    cases.both("matrix", matrix, "spectrum-shape", "a vector of floats is wanted", **how)
    cases.add("length-not-as-config", made(5), "check", finding="frequency-mismatch")
    seed = made(random_loc_seed="777")
    cases.add("seed-text", seed, "convert", error="invalid", message="64-bit whole number", **how)
    huge = made(scaling=1e300)
    cases.add("scaling-huge", huge, "convert", error="invalid", message="a finite number is wanted", **how)


def invalid(cases: Cases) -> None:
    hostile(cases, CONFIG, f"{PFX}{Q}.fourierft_spectrum")
