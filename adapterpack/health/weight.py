"""What an adapter carries besides its parameters: weights of the base, files that can run code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

from adapterpack.adapter import Adapter, Finding, Progress
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.health.naming import MENDED

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SHOWN = 5


def file_findings(c: Checkpoint) -> Iterator[Finding]:
    """Pickles, and a tensor file without the word that loaders look for."""
    if c.weights is None and c.pack is None and c.tensors:
        yield Finding(
            "pickle",
            "adapter_model.bin",
            "its weights are a pickle, which can run code when others load it; engines and the Hub refuse or flag it",
            MENDED,
            warning=True,
        )
    elif c.tensors and c.metadata.get("format") not in ("pt", "np", "tf", "flax", "mlx"):
        yield Finding(
            "no-format",
            "__metadata__",
            'the tensor file does not say {"format": "pt"}: transformers and others refuse such a file',
            MENDED,
            warning=True,
        )
    beside = [n for n in dict.fromkeys((*c.state, *c.left)) if PurePosixPath(n).suffix in _PICKLES]
    if beside:
        yield Finding(
            "pickles-beside",
            beside[0],
            f"{len(beside)} pickles lie beside it ({', '.join(beside[:_SHOWN])}): loading one can run code",
            "convert, compress and push leave them behind",
            warning=True,
        )


def saved_findings(a: Adapter, model: Base | None, *, values: bool, progress: Progress | None) -> Iterator[Finding]:
    """Whole weights of the base in the file: how many bytes, why, and which are the base's own, bit for bit.

    Args:
        values: May the base's values be read?
    """
    whole = {t: e[0].param for t, e in a.replaced.items() if len(e) == 1 and e[0].rows is None}
    own = {t: p for t, p in whole.items() if not p.key.endswith(".bias")}
    if not own:
        return
    total = sum(t.nbytes for t in a.source.tensors.values())
    size = sum(p.tensor.nbytes for p in own.values())
    saved = [t for t, p in own.items() if ".base_layer." in p.key]
    named = [t for t in own if t not in saved]
    parts = []
    if saved:
        parts.append(f"saved embeddings that target_modules brought in ({_some(saved)})")
    if named:
        parts.append(f"modules_to_save={a.config.get('modules_to_save')!r:.100} ({_some(named)})")
    yield Finding(
        "full-weights",
        next(iter(own.values())).key,
        f"{len(own)} whole weights of the base, {size:,} of {total:,} bytes: {'; '.join(parts)}; most engines refuse"
        " them",
        "compress --base BASE drops embeddings that equal the base's; convert --for ENGINE --extra splits or folds",
        warning=True,
    )
    yield from _by_suffix(a, named)
    if model is not None and values and model.tensors:
        same = {}
        for n, (target, p) in enumerate(own.items()):
            if progress:
                progress("saved weights", n, len(own))
            if model.on_disk(target) is not None and model.tensor(target).equals(p.tensor):
                same[p.key] = p.tensor.nbytes
        if progress:
            progress("saved weights", len(own), len(own))
        if same:
            yield Finding(
                "droppable",
                next(iter(same)),
                f"{len(same)} of them are the base's own, bit for bit: {sum(same.values()):,} bytes say nothing",
                "adapterpack compress SRC DST --base BASE drops saved embeddings; of modules_to_save the names"
                " have to leave the config, too",
                warning=True,
            )


def _by_suffix(a: Adapter, named: list[str]) -> Iterator[Finding]:
    """PEFT looks for the names of modules_to_save at the end of a module's, with no dot between: `norm` is many."""
    said = a.config.get("modules_to_save")
    caught: defaultdict[str, list[str]] = defaultdict(list)
    for target in named:
        module = target.rpartition(".")[0]
        for s in said if isinstance(said, list) else ():
            last = module.rpartition(".")[2]
            if last.endswith(str(s)) and last != str(s) and f".{s}." not in f".{module}.":
                caught[str(s)].append(target)
    for word, targets in caught.items():
        yield Finding(
            "undelimited-name",
            "modules_to_save",
            f"{word!r} caught {len(targets)} modules that only end in it: {_some(targets)}",
            "name the modules in full before training",
            warning=True,
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
