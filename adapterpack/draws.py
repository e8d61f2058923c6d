"""The random numbers that PEFT draws, in our own numpy code: torch's CPU generator, its laws, and numpy's PCG64.

What is here is bit for bit what torch and numpy give, on every machine, but for `normal_near`. Normal draws go
through torch's own vector logarithm and sine, which differ between its builds: the exact ones take torch itself.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from adapterpack import limits
from adapterpack.errors import Unsupported
from adapterpack.tensor import DType, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    from adapterpack.tensor import Array

DEFAULT_SEED = 67280421310721
"""Of a `torch.Generator()` that nobody seeded (c10/core/GeneratorImpl.h, `default_rng_seed_val`)."""
_LARGE = (2**32 - 1) // 20
"""From this size on torch shuffles in another way (ATen, `randperm_cpu`)."""


def large(size: int) -> bool:
    """Does a permutation of that size take a number for each of its elements, however few are wanted?"""
    return size >= _LARGE


def mt19937(seed: int) -> np.random.MT19937:
    """The state of `torch.Generator("cpu").manual_seed(seed)`: init_genrand of the low 32 bits.

    numpy seeds its own generators through another function, so the 624 words are written out here
    (Matsumoto and Nishimura 1998; multiplier 1812433253).
    """
    import numpy as np

    words = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    generator = np.random.MT19937()
    generator.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(words, dtype=np.uint32), "pos": 624},
    }
    return generator


def uniform(generator: np.random.MT19937, shape: tuple[int, ...], bound: float, *, fused: bool) -> Array:
    """`torch.empty(shape).uniform_(-bound, bound)` on a CPU, bit for bit, float32.

    `u * (to - from) + from` with u of 24 bits. Fused: product and sum fit in the 53 bits of a double, so
    one rounding at the end is what a fused multiply-add gives. Else: each of the two operations rounds.
    """
    import numpy as np

    out = np.empty(math.prod(shape), dtype=np.float32)
    low, high = np.float32(-bound), np.float32(bound)
    span = np.float32(high - low)
    step = 1 << 20
    for start in range(0, out.size, step):
        part = out[start : start + step]
        raw = generator.random_raw(part.size) & np.uint64(0xFFFFFF)
        if fused:
            part[:] = raw.astype(np.float64) * 2.0**-24 * np.float64(span) + np.float64(low)
        else:
            part[:] = raw.astype(np.float32) * np.float32(2.0**-24) * span + low
    return out.reshape(shape)


def narrow_uniform(
    generator: np.random.MT19937, shape: tuple[int, ...], bound: float, dtype: DType, *, fused: bool
) -> Array:
    """The same into a tensor of 16 bits: rounded from float32, and what would reach the upper bound is the lower one.

    The bounds of the arithmetic are those in float32, the bound that must not be reached that of the dtype
    (ATen, `uniform_real_distribution` and `uniform_kernel`).
    """
    import numpy as np

    values = uniform(generator, shape, bound, fused=fused).astype(numpy_dtype(dtype))
    low, high = (np.float32(b).astype(numpy_dtype(dtype)) for b in (-bound, bound))
    return np.where(values >= high, low, values)


def unit(generator: np.random.MT19937, shape: tuple[int, ...]) -> Array:
    """`torch.rand(shape)` on a CPU, bit for bit, float32 in [0, 1)."""
    import numpy as np

    raw = generator.random_raw(math.prod(shape)) & np.uint64(0xFFFFFF)
    return (raw.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


@functools.lru_cache(maxsize=32)
def permutation(size: int, count: int, seed: int) -> Array:
    """`torch.randperm(size, generator=manual_seed(seed))[:count]`, int64, read-only.

    torch shuffles from the front where `size` is small (ATen, `randperm_cpu`): the first entries are settled by as
    many swaps, so that nothing of length `size` is made. From 214,748,364 on it shuffles inside out, and each entry
    behind the first ones may still take the place of one of them: all numbers are drawn, in pieces.

    Raises:
        Unsupported: it is too large, or count > size.
    """
    if not 0 <= count <= size:
        raise Unsupported(f"{count:,} places of {size:,} cannot be drawn")
    if count > limits.RECIPE_ELEMENTS or size > limits.PERMUTATION:
        raise Unsupported(f"a permutation of {size:,} is more than is drawn (at most {limits.PERMUTATION:,})")
    out = _from_the_front(size, count, seed) if not large(size) else _inside_out(size, count, seed)
    out.flags.writeable = False
    return out


def _from_the_front(size: int, count: int, seed: int) -> Array:
    import numpy as np

    # A last step with nothing to choose from is not taken, and takes no number.
    steps = min(count, max(size - 1, 0))
    left = np.uint64(size) - np.arange(steps, dtype=np.uint64)
    chosen = (mt19937(seed).random_raw(steps) % left).astype(np.int64) + np.arange(steps)
    # What was swapped away, by its place.
    moved: dict[int, int] = {}
    out = np.empty(count, dtype=np.int64)
    for i, place in enumerate(chosen.tolist()):
        out[i] = moved.get(place, place)
        moved[place] = moved.pop(i, i)
    if count > steps:
        out[steps] = moved.get(steps, steps)
    return out


def _inside_out(size: int, count: int, seed: int, piece: int = 1 << 22) -> Array:
    import numpy as np

    generator = mt19937(seed)

    def places(start: int, stop: int) -> Array:
        pairs = generator.random_raw(2 * (stop - start)).reshape(-1, 2)
        return (pairs[:, 0] << np.uint64(32) | pairs[:, 1]) % np.arange(start + 1, stop + 1, dtype=np.uint64)

    out = np.empty(count, dtype=np.int64)
    for i, place in enumerate(places(0, count).tolist()):
        out[i] = out[place] if place < i else i
        out[place] = i
    for start in range(count, size, piece):
        chosen = places(start, min(start + piece, size))
        hit = np.flatnonzero(chosen < count)
        # Of those that take one place the last one stays.
        out[chosen[hit].astype(np.int64)] = hit + start
    return out


def balanced(length: int, total: int, seed: int) -> Array:
    """`total` numbers below `length`, each as often as any other (or once more), shuffled, int64.

    numpy's PCG64, `choice` without replacement for the rest and `shuffle`, as UniLoRA calls them
    (peft/tuners/unilora/model.py, `generate_index`).
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    data = np.repeat(np.arange(length), total // length)
    if total % length:
        data = np.concatenate([data, rng.choice(length, size=total % length, replace=False)])
    rng.shuffle(data)
    return data.astype(np.int64, copy=False)


def normal_near(seed: int, count: int, std: float) -> Array:
    """The first of `torch.normal(0, std, (count,))` to a few units in the last place, float64.

    Enough to tell whose draw a tensor is, not to make one. Box and Muller: below 16 numbers in doubles, one pair
    after the other; else in blocks of 16 whose halves are the pairs (ATen, `normal_fill`). Of a length that is no
    multiple of 16 the last block is drawn anew, so all is computed then.

    Returns:
        `count` numbers where there are at most 32, else the first 8.
    """
    import numpy as np

    generator = mt19937(seed)
    if count < 16:
        words = generator.random_raw(4 * ((count + 1) // 2)).reshape(-1, 2)
        u = ((words[:, 0] << np.uint64(32) | words[:, 1]) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-u[1::2])), 2 * math.pi * u[::2]
        return (np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1) * std)[:count]

    def block(u: Array) -> Array:
        radius, angle = np.sqrt(-2 * np.log(1 - u[:8])), 2 * math.pi * u[8:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]) * std

    u = unit(generator, (count,)).astype(np.float64) if count <= 32 else unit(generator, (16,)).astype(np.float64)
    if count > 32:
        return block(u)[:8]
    out = u.copy()
    for start in range(0, count - 15, 16):
        out[start : start + 16] = block(u[start : start + 16])
    if count % 16:
        out[-16:] = block(unit(generator, (16,)).astype(np.float64))
    return out
