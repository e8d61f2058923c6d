"""Do two adapters, or an adapter and a merged model, answer the same? They are run, beside the noise of running.

`verify` compares weights, and stays the judge of them. Here the base is changed as each side says, and prompts are
run. Three things tell what a difference is worth: what the adapter does at all (A against the base alone); how far A
is from itself when nothing but the order of sums differs (the same prompts, padded, in batches, in another order);
and how far it is when it computes in 16 bits, as models are served. Adapters are applied to the weights by our own
arithmetic in f64: PEFT is not needed, and not believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapterpack import containers, lineage, methods, plan, prompts, running, sources
from adapterpack.adapter import EQUIVALENT_ERROR, Adapter, Finding, Method, Progress
from adapterpack.answers import Figures, Sums
from adapterpack.backend import Array, Backend, TorchBackend
from adapterpack.base import Base
from adapterpack.errors import Unsupported, UsageError
from adapterpack.prompts import Prompt
from adapterpack.running import Family, Side
from adapterpack.tensor import BF16, CASTABLE, F16, F32, DType

FACTOR = 10.0
"""How many times the noise a difference may be: it is measured on a few prompts, and weights that are equal but for
their own rounding are a little further apart than the order of sums."""
ROUNDING = 3.0
"""The same for weights rounded to 16 bits: two honest roundings are apart by the root of 2, merges that round on the
way by about 2, and ten times as much would be all that many an adapter does."""
_EPSILON = {"F32": 2.0**-24, "BF16": 2.0**-9, "F16": 2.0**-12}
"""Half a unit in the last place of 1: less than this, relative to the answers, no measured noise is taken for."""


@dataclass(frozen=True)
class Noise:
    """How far A is from itself.

    Attributes:
        name: `batch order`, `bfloat16`; `rounded to BF16`: with weights as a merged model has them.
        figures: Of A so against A run one by one.
        allowed: Does it excuse a difference? What 16 bits do is told for comparison alone.
    """

    name: str
    figures: Figures
    allowed: bool


@dataclass(frozen=True)
class PromptBehaviour:
    """One prompt.

    Attributes:
        line: In the file.
        tokens: How many.
        difference: A against B.
        effect: A against the base alone.
    """

    line: int
    tokens: int
    difference: Figures
    effect: Figures


@dataclass(frozen=True)
class Behaviour:
    """What running said.

    Attributes:
        within: Is the difference no more than what is allowed?
        architecture: `LlamaForCausalLM`.
        kind: `causal-lm`, `masked-lm`, `token-classification`, `sequence-classification`, `encoder`.
        against: `adapter` or `merged`: what B is.
        dtype: What models computed in.
        device: Where.
        prompts: How many.
        positions: Rows compared: tokens, or prompts where a model gives one answer to each.
        difference: A against B, over all positions.
        effect: A against the base alone.
        of_effect: The difference as a part of the effect, root mean squares; None where there is no effect.
        allowed: Largest root mean square of a difference that counts as none.
        noise: A against itself.
        each: One entry for each prompt, the largest difference first.
        findings: What is wrong, or leaves the figures without meaning.
        notes: How it was done, where that is not plain.
        transformers: Its version.
    """

    within: bool
    architecture: str
    kind: str
    against: str
    dtype: str
    device: str
    prompts: int
    positions: int
    difference: Figures
    effect: Figures
    of_effect: float | None
    allowed: float
    noise: tuple[Noise, ...]
    each: tuple[PromptBehaviour, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    transformers: str


def compare(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None,
    file: str | Path,
    max_error: float | None = None,
    dtype: str = "float32",
    device: str = "auto",
    subfolder: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Behaviour:
    """Run prompts through base + A, and through base + B or the merged model B, and compare the answers.

    A difference is within what is allowed if its root mean square is at most the sum of

    - `FACTOR` times the noise of batch order, or half a unit in the last place of the answers if that is more,
    - `FACTOR` times the error of the weights that was allowed, `max_error`, times the effect of A,
    - `ROUNDING` times the noise of rounding the weights of base + A once, for a merged model of 16 bits.

    Memory holds one model at a time, and the answers of A.

    Args:
        a: The reference adapter.
        b: An adapter, or a model directory.
        base: The base model. Its config.json says which of transformers' classes it is.
        file: The prompts; see `prompts.read`.
        max_error: As in `verify.verify`; None: 5e-6 between adapters, none for a merged model.
        dtype: What models compute in.
        device: Where they do.
        subfolder: Which adapter of A, if there are several.

    Raises:
        UsageError: no base, no transformers, no tokenizer where prompts are texts, no such dtype or device.
        Unsupported: transformers has no such model, or it has no place for a tensor that changes.
        InvalidFile, WrongBase, LossRefused: the prompts, an adapter or a model cannot be read, or do not fit.
    """
    if base is None:
        raise UsageError("--prompts runs models: name the one that A was made for", hint="--base BASE")
    if dtype not in CASTABLE:
        raise UsageError(f"no dtype {dtype!r:.40} to run models in", hint=f"one of {', '.join(CASTABLE)}")
    library = running.transformers()
    asked = prompts.read(file)
    with ExitStack() as stack:
        model = stack.enter_context(Base(sources.base_here(base)))
        family = Family.of(model)
        asked = prompts.encode(asked, lambda: running.tokenizer(model.path), family.vocabulary, family.longest)
        running.check_size(family, asked)

        def opened(source: Path, sub: str | None) -> tuple[Method, Adapter]:
            found = containers.open_checkpoint(source, subfolder=sub, allow_pickle=allow_pickle, base=model.path)
            return methods.parse(stack.enter_context(found))

        adapter = opened(sources.here(a, subfolder), subfolder)
        other = sources.model_here(b)
        merged = stack.enter_context(Base(other)) if sources.is_model(other) else None
        weight = 1.0 if merged is None else _weight(adapter[1], merged)
        made = plan.make([adapter], model, weights=[weight])
        if merged is None:
            side = Side("base + B", model, plan.make([opened(other, None)], model))
            bound = EQUIVALENT_ERROR if max_error is None else max_error
        else:
            side, bound = Side("merged B", merged), max_error or 0.0
        job = _Job(family, asked, TorchBackend(device), CASTABLE[dtype], model, made, progress)
        return job.run(side, bound, str(library.__version__))


def _weight(adapter: Adapter, merged: Base) -> float:
    """The factor with which the adapter was merged, as the model's lineage says; 1 where nothing does.

    Raises:
        Unsupported: it was merged with others.
    """
    story = lineage.read(merged.path)
    mine = [s for s in story.adapters if s.sha256 == adapter.source.digest()] if story is not None else []
    if story is None or not mine:
        return 1.0
    if len(story.adapters) > 1:
        raise Unsupported(
            f"{merged.path} was merged from {len(story.adapters)} adapters: its answers say nothing of one of them",
            hint="verify without --prompts compares its weights with those of all",
        )
    return mine[0].weight


@dataclass
class _Job:
    """One comparison: what is run, and how."""

    family: Family
    prompts: Sequence[Prompt]
    xp: Backend
    dtype: DType
    base: Base
    made: plan.Plan
    progress: Progress | None

    def run(self, side: Side, bound: float, version: str) -> Behaviour:
        merged = side.made is None
        us = Side("base + A", self.base, self.made)
        self.kept: dict[int, Array] = {}
        notes = list(self.base.name_notes)
        batch, said = self._first(us)
        notes += said
        noise = [Noise("batch order", _pooled(batch), True)]
        own = self.base.dtype or F32
        low = own if own in (BF16, F16) else BF16
        if low != self.dtype:
            try:
                noise.append(Noise(_NAMES[low.name], _pooled(self._against(us, low)[0]), False))
            except Unsupported as e:
                # Told for comparison alone; not every device computes in every dtype.
                notes.append(e.message)
        if merged and own in (BF16, F16):
            rounded = Side("base + A, rounded", self.base, self.made, rounded=True)
            noise.append(Noise(f"rounded to {own}", _pooled(self._against(rounded, self.dtype)[0]), True))
        effect, _ = self._against(Side("base", self.base), self.dtype)
        difference, said = self._against(side, self.dtype)
        notes += [note for note in said if note not in notes]
        pooled, does = _pooled(difference), _pooled(effect)
        floor = max(noise[0].figures.rms, _EPSILON[self.dtype.name] * does.scale)
        others = sum(n.figures.rms for n in noise[1:] if n.allowed)
        allowed = FACTOR * (floor + bound * does.rms) + ROUNDING * others
        each = [
            PromptBehaviour(p.line, len(p.ids), difference[n].figures(), effect[n].figures())
            for n, p in enumerate(self.prompts)
        ]
        findings = _findings(pooled, does, allowed, FACTOR * floor)
        return Behaviour(
            within=pooled.rms <= allowed,
            architecture=self.family.name,
            kind=self.family.kind.name,
            against="merged" if merged else "adapter",
            dtype=_NAMES[self.dtype.name],
            device=self.xp.name,
            prompts=len(self.prompts),
            positions=pooled.positions,
            difference=pooled,
            effect=does,
            of_effect=pooled.rms / does.rms if does.rms > 0 else None,
            allowed=allowed,
            noise=tuple(noise),
            each=tuple(sorted(each, key=lambda e: -e.difference.rms if e.difference.rms >= 0 else -math.inf)),
            findings=tuple(findings),
            notes=tuple(notes),
            transformers=version,
        )

    def _first(self, us: Side) -> tuple[dict[int, Sums], list[str]]:
        """Run A one by one, which is kept, and in batches, which is compared with it."""
        model, notes = us.load(self.family, self.xp, self.dtype, self.prompts)
        tell = running.teller(self.progress, us.name, len(self.prompts))
        for n, rows in running.answers(model, self.family, self.prompts, running.singly(self.prompts), self.xp, tell):
            self.kept[n] = rows.float().cpu()
        found = self._held(model, "base + A, in batches", running.together(self.prompts))
        del model
        running.free(self.xp)
        return found, notes

    def _against(self, side: Side, dtype: DType) -> tuple[dict[int, Sums], list[str]]:
        """Run a side one by one and compare it with A, prompt by prompt."""
        model, notes = side.load(self.family, self.xp, dtype, self.prompts)
        name = side.name if dtype == self.dtype else f"{side.name}, {_NAMES[dtype.name]}"
        found = self._held(model, name, running.singly(self.prompts))
        del model
        running.free(self.xp)
        return found, notes

    def _held(self, model: object, name: str, batches: Sequence[Sequence[int]]) -> dict[int, Sums]:
        tell = running.teller(self.progress, name, len(self.prompts))
        proofs, kind = self.xp.for_proofs(), self.family.kind
        classes = kind.classes and self.family.width > 1
        found: dict[int, Sums] = {}
        for n, rows in running.answers(model, self.family, self.prompts, batches, self.xp, tell):
            found[n] = Sums(proofs, classes)
            found[n].add(self.kept[n], rows.float())
        return found


_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _pooled(sums: Mapping[int, Sums]) -> Figures:
    whole = Sums(*next(iter(sums.values())).how)
    for s in sums.values():
        whole.join(s)
    return whole.figures()


def _findings(difference: Figures, effect: Figures, allowed: float, floor: float) -> list[Finding]:
    """What the figures say.

    Weights that are equal and answers that are not would be a fault of ours, of the loader or of a model that makes
    much of little; so it is a finding whatever the weights are.
    """
    found = []
    if not math.isfinite(effect.rms):
        said = "base + A or the base alone answers with NaN or infinite values: nothing can be compared"
        return [Finding("nan", "base + A", said, "try --dtype float32")]
    if not math.isfinite(difference.rms):
        return [Finding("nan", "B", "its answers have NaN or infinite values, and those of A do not")]
    if difference.rms > allowed:
        times = f"{difference.rms / effect.rms:.1%} of what A does to the base" if effect.rms else "A does nothing"
        said = f"the answers differ by {difference.rms:.1e} (root mean square), {allowed:.1e} is noise; {times}"
        found.append(Finding("behaviour", "prompts", said))
    if effect.rms <= floor:
        said = "A changes the answers to these prompts by no more than noise: they cannot tell adapters apart"
        found.append(Finding("no-effect", "prompts", said, "other prompts, like those A was trained on", True))
    return found
