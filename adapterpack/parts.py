"""What an adapter consists of, part by part, and how many bytes each takes: from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from adapterpack.adapter import Adapter
from adapterpack.tensor import Tensor


def of(a: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Each tensor and the part that it belongs to: `lora_A`, `vector bank`, `modules_to_save` ..."""
    for params in a.modules.values():
        yield from ((name, p.tensor) for name, p in params.items())
    yield from ((name, p.tensor) for name, p in a.shared.items())
    for entries in a.replaced.values():
        for r in entries:
            what = "token rows" if r.rows is not None else "saved embeddings"
            if r.rows is None and ".base_layer." not in r.param.key:
                what = "modules_to_save"
            yield ("biases" if r.param.key.endswith(".bias") else what), r.param.tensor
    yield from (("unknown", t) for t in a.extra.values())


def sizes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Part to bytes, the largest first."""
    found: Counter[str] = Counter()
    for part, tensor in tensors:
        found[part] += tensor.nbytes
    return dict(found.most_common())
