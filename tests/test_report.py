"""Reports: one file, nothing from outside, hostile names harmless; what a browser shows and what keys do in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import math
import re
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from test_cli import run

import adapterpack
from adapterpack import report
from adapterpack.accuracy import ModuleError, pooled
from adapterpack.adapter import Finding
from adapterpack.answers import Figures
from adapterpack.behaviour import Behaviour, Noise, PromptBehaviour
from adapterpack.errors import DestinationExists, UsageError
from adapterpack.evidence import Side, Spectrum
from adapterpack.regeneration import Regenerated
from adapterpack.report import charts, grid, html, palette, plots
from adapterpack.verify import Verification

KINDS = [*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
HOSTILE = [
    "model.layers.0.<script>alert(1)</script>.weight",
    "model.layers.1.\"'><img src=x onerror=alert(1)>.weight",
    "x</script></style></title><svg onload=alert(1)>.weight",
    "model.layers.2.\u202egnp.exe\u202c\x00\x1b[31m\ud800.weight",
    "a" * 5000,
    "model.layers." + "9" * 5000 + ".q_proj.weight",
]


def module(name: str, error: float, **more: Any) -> ModuleError:
    plain = {"shape": (64, 32), "rank_a": 8, "rank_b": 4, "norm": 2.5, "norm_b": 2.5, "difference": error * 2.5}
    return ModuleError(name, error / 10, error, **{**plain, "cosine": 1 - min(1.0, error) ** 2, **more})


def verification(modules: list[ModuleError], **over: Any) -> Verification:
    modules = sorted(modules, key=lambda m: -m.rel_error if m.rel_error == m.rel_error else -math.inf)
    worst = modules[0].rel_error if modules else 0.0
    facts: dict[str, Any] = {
        "equal": worst <= 5e-6,
        "max_error": 5e-6,
        "max_abs_error": max((m.max_abs_error for m in modules), default=0.0),
        "max_rel_error": worst,
        "modules": tuple(modules),
        "findings": (),
        "notes": ("a note",),
        "a": "a/b",
        "b": "c/d",
        "base": None,
        "against": "adapter",
        "method_a": "lora",
        "method_b": "vera",
        "encoding_a": "lora",
        "encoding_b": "seed",
        "device": "torch cpu",
        "pooled": pooled(modules),
        "sides": (
            Side("A", 9_000_000, 448, {"lora_B": 5_000_000, "lora_A": 3_000_000}, {"F32": 448}),
            Side("B", 4_500_000, 448, {"lora_B": 2_500_000, "lora_A": 1_500_000}, {"BF16": 448}),
        ),
    }
    return Verification(**{**facts, **over})


def llama(layers: int = 32) -> Verification:
    """As of a 7B model: 224 modules, two beyond the bound, one missing."""
    g = torch.Generator().manual_seed(1)
    names = [f"model.layers.{n}.{kind}.weight" for n in range(layers) for kind in KINDS]
    missing, bad = names.pop(5), {names[30]: 3e-3, names[100 % len(names)]: 2e-5}
    errors = 10 ** (-8 + 2 * torch.rand(len(names), generator=g))
    spectra = [
        Spectrum(side, name, tuple((torch.logspace(1, -1, 16) * (1 + n % 5)).tolist()))
        for n, name in enumerate(names)
        for side in "AB"
    ]
    return verification(
        [module(n, bad.get(n, e)) for n, e in zip(names, errors.tolist(), strict=True)],
        equal=False,
        findings=(
            Finding("missing-module", missing, "B does not change it", "convert it again"),
            Finding("wrong-seed", "seed", "another one", None, warning=True),
        ),
        spectra=tuple(spectra),
        regenerated=(Regenerated("A", "vera_A", "numpy", 7, "fused", "F32", "stored tensor", True, "ab" * 32),),
    )


class Parsed(HTMLParser):
    """Checks that every element is closed in order, and keeps what was there."""

    VOID = frozenset({"meta", "wbr", "br", "hr", "input", "col", "link", "img"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.elements if "id" in a]


def pages() -> dict[str, Verification]:
    merged = [module(f"h.{n}.attn.c_attn.weight", 1e-3, bound=4e-3, floor=1e-3, factor=1.0) for n in range(4)]
    wrong = Finding("wrong-scale", merged[1].name, "alpha/r was dropped", "merge again")
    return {
        "7b": llama(),
        "tiny": verification([module("q.weight", 0.0)]),
        "nothing": verification([], equal=False, sides=(), notes=(), findings=(Finding("wrong-base", "x", "y"),)),
        "no layers": verification([module(f"block_{c}.weight", 1e-7) for c in "abc"]),
        "merged": verification(
            merged,
            against="merged",
            method_b=None,
            encoding_b=None,
            max_error=math.inf,
            equal=False,
            findings=(wrong,),
        ),
        "not finite": verification(
            [module("layers.0.q.weight", math.nan), module("layers.1.q.weight", math.inf), module("l.2.q", 1e-300)]
        ),
        "exact bound of 0": verification([module("l.0.q", 1e-9), module("l.1.q", 0.0)], max_error=0.0),
        "hostile": verification(
            [module(n, 1e-7) for n in HOSTILE],
            a=HOSTILE[2],
            findings=tuple(Finding(n, n, n, n) for n in HOSTILE),
            notes=tuple(HOSTILE),
            device=HOSTILE[0],
            sides=(Side("A", 1, 1, {HOSTILE[0]: 1}, {"F32": 1}),),
            spectra=tuple(Spectrum("A", n, (1.0,)) for n in HOSTILE),
            regenerated=(Regenerated("A", HOSTILE[1], HOSTILE[0], None, None, None, "stored tensor", False, None),),
        ),
        "experts": verification(
            [
                module(f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight", 1e-7 * (1 + e))
                for n in range(4)
                for e in range(16)
                for p in ("gate", "up", "down")
            ]
        ),
    }


@pytest.fixture(params=pages(), ids=str)
def page(request: pytest.FixtureRequest) -> str:
    return report.render(pages()[request.param])


# -- the file, without a browser ---------------------------------------------------------------------------


def test_a_page_is_well_formed_and_every_link_leads_somewhere(page: str) -> None:
    parsed = Parsed(page)
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    links = [a["href"] or "" for a in parsed.all("a")]
    assert all(link.startswith("#") and link[1:] in ids for link in links), links
    labels = [a["aria-labelledby"] for _, a in parsed.elements if "aria-labelledby" in a]
    assert set(labels) <= set(ids)
    page.encode()


def test_a_page_asks_for_nothing_and_may_run_nothing_but_its_own(page: str) -> None:
    parsed = Parsed(page)
    assert not parsed.all("link", "img", "iframe", "object", "embed", "base", "video", "audio", "use", "image")
    for tag, attributes in parsed.elements:
        assert not {"src", "srcset", "style", "action", "xlink:href"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    style, script = ("".join(parsed.texts[t]) for t in ("style", "script"))
    assert not re.search(r"url\(|@import|https?:|//[a-z]", style)
    assert not re.search(r"fetch|XMLHttp|import\(|https?:|innerHTML|eval", script)
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "unsafe" not in policy and policy.startswith("default-src 'none';")
    for content, kind in ((style, "style"), (script, "script")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert len(parsed.all("script")) == len(parsed.all("style")) == 1


def test_a_page_can_be_heard_and_reached_by_keys(page: str) -> None:
    parsed = Parsed(page)
    order = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert order.count(1) == 1 and order[0] == 1
    assert all(later - before <= 1 for before, later in itertools.pairwise(order))
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert all(a.get("scope") for a in parsed.all("th"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in parsed.all("svg"))
    assert all(int(a["tabindex"] or 9) <= 0 for _, a in parsed.elements if "tabindex" in a)
    scrolling = [a for _, a in parsed.elements if "scroll" in (a.get("class") or "").split()]
    assert all(a.get("tabindex") == "0" and a.get("role") == "region" and a.get("aria-label") for a in scrolling)
    assert parsed.all("html") == [{"lang": "en"}]
    first = next(a for tag, a in parsed.elements if tag == "a")
    assert first["href"] == "#main" and parsed.all("main")[0]["id"] == "main"


def test_the_same_facts_give_the_same_bytes_and_a_date_only_if_it_is_given() -> None:
    assert report.render(llama()) == report.render(llama())
    assert "2031-01-02" in report.render(llama(), when="2031-01-02")


def test_hostile_names_are_text_and_what_is_hidden_in_them_is_spelled_out() -> None:
    page = report.render(pages()["hostile"])
    parsed = Parsed(page)
    tags = {tag for tag, _ in parsed.elements}
    assert "img" not in tags and len(parsed.all("script")) == 1
    assert not re.search("[\u202a-\u202e\x00\x1b\ud800]", page)
    assert "\\u202egnp.exe" in page
    assert "<script>alert(1)</script>" in "".join(parsed.texts["code"] + parsed.texts["li"])
    assert len(page) < 400_000


def test_text_is_escaped_wherever_it_stands_and_markup_is_not_escaped_twice() -> None:
    inner = html.tag("b", "a<b&c")
    assert html.tag("p", inner, "<", class_='"x', hidden=True, title=None) == (
        '<p class="&quot;x" hidden><b>a&lt;b&amp;c</b>&lt;</p>'
    )
    assert html.join(["<", inner], "&") == "&lt;&amp;<b>a&lt;b&amp;c</b>"
    assert html.code("a.b/<c") == "<code>a.<wbr>b/<wbr>&lt;c</code>"


def test_numbers_are_for_people() -> None:
    said = {0: "0", 1.0: "1", 3.14e-7: "3.1e-7", 2e-7: "2.0e-7", 0.0325: "0.0325", 12345.0: "1.2e4", 512.0: "512"}
    assert {x: html.number(x) for x in said} == said
    assert [html.number(x) for x in (None, math.nan, math.inf, -math.inf)] == ["", "NaN", "∞", "−∞"]
    assert html.short(5e-6) == "5e-6"
    assert [html.cosine(x) for x in (None, 1.0, 1 - 2e-9, 0.5)] == ["", "1", "1 − 2.0e-9", "0.5000"]
    assert [html.size(n) for n in (0, 999, 1000, 20_047_457, 10**13)] == ["0 B", "999 B", "1 kB", "20 MB", "10 TB"]


def test_colours_say_how_far_an_error_is_from_its_bound() -> None:
    bound = 5e-6
    assert palette.level(0.0, bound) == palette.ZERO
    assert palette.level(bound, bound) == palette.WITHIN - 1
    assert palette.level(math.nextafter(bound, 1), bound) == palette.WITHIN
    assert palette.level(1e-30, bound) == 0
    levels = [palette.level(bound * 10 ** (n / 2), bound) for n in range(-9, 1)]
    assert levels == list(range(10))
    assert [palette.level(bound * x, bound) for x in (5, 50, 500, math.inf, math.nan)] == [10, 11, 12, 12, 12]
    assert palette.level(1e-9, 0.0) == 12 and palette.level(0.5, None) == 9


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_figures_can_be_read_on_every_colour_and_levels_be_told_apart(theme: tuple[str, ...]) -> None:
    assert len(theme) == palette.WITHIN + 3
    assert all(palette.contrast(c, palette.ink(c)) >= 4.5 for c in theme)
    steps = [palette.luminance(c) for c in theme[: palette.WITHIN]]
    assert steps == sorted(steps, reverse=theme is palette.LIGHT)


def test_the_themes_of_the_style_sheet_can_be_read() -> None:
    css = files("adapterpack.report").joinpath("style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[0]))
    dark = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[1]))
    assert light.keys() == dark.keys() and len(light) >= 15
    for theme in (light, dark):
        for fore in ("ink", "soft", "link", "good", "bad", "warn"):
            for back in ("page", "card", "hover"):
                assert palette.contrast(theme[fore], theme[back]) >= 4.5, (fore, back)
        for tone in ("good", "bad", "warn"):
            assert palette.contrast(theme[tone], theme[f"{tone}-back"]) >= 4.5
        for fore in ("a", "b", "focus"):
            assert palette.contrast(theme[fore], theme["card"]) >= 3


def test_modules_lie_by_layer_and_kind_and_none_is_lost() -> None:
    names = [m.name for m in llama().modules]
    (stack,), rest = grid.grids(names)
    assert (stack.stack, stack.rows, stack.columns, rest) == ("model.layers", list(range(32)), KINDS, [])
    assert stack.cells[3, "mlp.up_proj"] == ["model.layers.3.mlp.up_proj.weight"]
    for verified in pages().values():
        names = [m.name for m in verified.modules]
        stacks, rest = grid.grids(names)
        assert sorted(n for s in stacks for cell in s.cells.values() for n in cell) + sorted(rest) == sorted(
            set(names) - set(rest)
        ) + sorted(rest)
        assert len(rest) + sum(len(c) for s in stacks for c in s.cells.values()) == len(names)


def test_experts_share_a_column_and_many_kinds_or_layers_stay_bounded() -> None:
    (stack,), rest = grid.grids([m.name for m in pages()["experts"].modules])
    assert len(stack.columns) == 3 and not rest
    assert len(stack.cells[0, "mlp.experts.*.up_proj"]) == 16
    names = [f"l.{n}.{k}.weight" for n in range(500) for k in map(str, range(3))]
    names += [f"{s}.0.q.weight" for s in range(50)] + [f"l.0.kind{k}.weight" for k in range(90)]
    stacks, rest = grid.grids(names)
    assert all(len(s.rows) <= 400 and len(s.columns) <= 24 for s in stacks) and len(stacks) <= 8
    assert len(rest) + sum(len(c) for s in stacks for c in s.cells.values()) == len(names)


def test_every_module_is_counted_once_in_the_picture_of_errors() -> None:
    errors = [(0.0, 5e-6), (math.nan, 5e-6), (math.inf, 5e-6), *((10.0**-n, 5e-6) for n in range(1, 12))]
    drawn = plots.spread(errors, 5e-6, "label")
    for picture in drawn.split("<svg")[1:]:
        counts = [int(n.replace(",", "")) for n in re.findall(r'class="count">([\d,]+)<', picture)]
        assert sum(counts) == len(errors)
        assert "allowed 5e-6" in picture
        xs = [float(x) for x in re.findall(r'<(?:rect|text)[^>]* x="(-?[\d.]+)"', picture)]
        assert min(xs) >= 0


def test_singular_values_fall_on_one_scale_and_the_rank_for_most_is_told() -> None:
    decades = plots.Decades.of([(10.0, 1.0), (4.0, 1e-30)])
    assert decades.high == 10.0 and decades.low == 0.5
    assert decades.y(10.0, 100) == 0 and decades.y(0.0, 100) == 100 and 0 < decades.y(2.0, 100) < 100
    assert charts.rank_for([3.0, 4e-1, 1e-9]) == 2 and charts.rank_for([3.0, 0.1]) == 1
    assert charts.rank_for([0.0, 0.0]) == charts.rank_for([]) == 0 and charts.rank_for([1.0] * 8) == 8
    plots.Decades.of([]), plots.Decades.of([(0.0,)])


def test_a_table_of_very_many_modules_is_cut_and_says_so() -> None:
    page = report.render(verification([module(f"x{n}.weight", 1e-7) for n in range(2100)]))
    rows = [i for i in Parsed(page).ids() if re.fullmatch(r"m\d+", i)]
    assert len(rows) == 2000 and "2,000 worst of 2,100" in page


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("7b", ["A and B do not make the same change of W", "2 of 223 modules lie beyond", "1 finding"]),
        ("tiny", ["A and B make the same change of W", "1 module: it lies within", "without any difference"]),
        ("nothing", ["Nothing could be compared."]),
        ("merged", ["The merged model is not the base with A in it", "1 of 4 tensors has a fault", "merge again"]),
        ("not finite", ["2 of 3 modules lie beyond", "NaN"]),
    ],
)
def test_the_verdict_is_in_plain_words(name: str, said: list[str]) -> None:
    words = re.sub(r"<[^>]*>", "", report.render(pages()[name]))
    assert all(s in words for s in said), [s for s in said if s not in words]


# -- from real adapters ------------------------------------------------------------------------------------


def test_sizes_and_singular_values_are_those_of_the_files(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    found = adapterpack.verify(adapter, adapter, singular_values=True)
    a, b = found.sides
    assert (a.side, b.side) == ("A", "B") and dataclasses.replace(b, side="A") == a
    tensors = files.tensors(adapter)
    assert a.bytes == sum(f.stat().st_size for f in adapter.iterdir())
    assert sum(a.parts.values()) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert (a.tensors, a.dtypes) == (len(tensors), {"F32": len(tensors)})
    assert {(s.side, s.name) for s in found.spectra} == {(s, m.name) for m in found.modules for s in "AB"}
    q0 = "base_model.model.model.layers.0.self_attn.q_proj"
    dense = tensors[f"{q0}.lora_B.weight"].double() @ tensors[f"{q0}.lora_A.weight"].double() * 1.5
    values = next(s.values for s in found.spectra if s.name == "model.layers.0.self_attn.q_proj.weight")
    expected = torch.linalg.svdvals(dense)[: len(values)].tolist()
    assert values == pytest.approx(expected, rel=1e-9, abs=1e-12) and len(values) == 4
    assert adapterpack.verify(adapter, adapter).spectra == ()


def test_what_has_no_factors_has_no_singular_values_and_nan_is_no_error(workshop, files, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    broken = files.tensors(adapter)[key].clone()
    broken[0, 0] = math.nan
    found = adapterpack.verify(adapter, files.edited(adapter, tmp_path / "b", {key: broken}), singular_values=True)
    assert not found.equal and len(found.spectra) == 2 * len(found.modules) - 1
    Parsed(report.render(found))


def test_a_merged_model_is_measured_too(workshop, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    adapterpack.merge(adapter, into=base, output=tmp_path / "m")
    found = adapterpack.verify(adapter, tmp_path / "m", base=base, singular_values=True)
    a, b = found.sides
    assert set(b.parts) == {"changed", "not changed"} and b.bytes == sum(b.parts.values()) > a.bytes
    assert {s.side for s in found.spectra} == {"A"}
    assert "The merged model is the base with A in it" in report.render(found)


def test_the_command_writes_the_page_and_the_same_facts_as_json(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    out = tmp_path / "out.html"
    done = run("verify", adapter, adapter, "--report", out, "--json")
    assert done.code == 0, done.err
    spectra = done.json["spectra"]
    assert spectra and Parsed(out.read_text()).all("html")
    again = adapterpack.verify(str(adapter), str(adapter), singular_values=True)
    assert out.read_text() == report.render(again)
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]
    before = out.read_bytes()
    refused = run("verify", adapter, adapter, "--report", out)
    assert refused.code == 1 and "--overwrite" in refused.err and out.read_bytes() == before
    assert run("verify", adapter, adapter, "--report", out, "--overwrite", "-q").code == 0
    assert run("verify", adapter, adapter, "--overwrite").code == 2
    assert run("verify", adapter, adapter, "--report", tmp_path / "no" / "x.html").code == 1


def test_a_page_is_not_written_into_what_was_compared(workshop, tmp_path: Path) -> None:
    adapter, _ = workshop.pair("linear-llama")
    found = adapterpack.verify(adapter, adapter)
    with pytest.raises(UsageError, match="inside the input"):
        report.write(found, adapter / "out.html", protected=(adapter,))
    assert report.write(found, tmp_path / "x.html").is_file()
    with pytest.raises(DestinationExists):
        report.write(found, tmp_path / "x.html")


# -- the schema of --json ----------------------------------------------------------------------------------

SCHEMA = json.loads(files("adapterpack.cli").joinpath("schemas/verify.json").read_text("utf-8"))


def test_the_schema_names_every_field_and_no_other() -> None:
    kinds = {
        "module": ModuleError,
        "finding": Finding,
        "pooled": type(pooled([])),
        "regenerated": Regenerated,
        "side": Side,
        "spectrum": Spectrum,
        "figures": Figures,
        "noise": Noise,
        "prompt": PromptBehaviour,
        "behaviour": Behaviour,
    }
    for name, kind in kinds.items():
        fields = {f.name for f in dataclasses.fields(typing.cast(Any, kind))}
        said = SCHEMA["$defs"][name]
        assert set(said["properties"]) == set(said["required"]) == fields, name
    own = {f.name for f in dataclasses.fields(Verification)}
    assert set(SCHEMA["properties"]) == set(SCHEMA["required"]) == {"schema", "behaviour", *own}
    assert kinds.keys() == SCHEMA["$defs"].keys()


def test_what_is_printed_is_what_the_schema_says(workshop, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is of the extra `test`: install it again")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(SCHEMA)
    adapter, base = workshop.pair("linear-llama")
    vera, _ = workshop.pair("projection-mixed")
    adapterpack.merge(adapter, into=base, output=tmp_path / "m")
    calls = [
        (adapter, adapter),
        (adapter, vera),
        (vera, vera, "--report", tmp_path / "x.html"),
        (adapter, tmp_path / "m", "--base", base),
        (adapter, adapter, "--base", base, "--prompts", tmp_path / "prompts.jsonl"),
    ]
    (tmp_path / "prompts.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4, 5]}\n')
    for call in calls:
        record = run("verify", *call, "--json").json
        assert not list(validator(SCHEMA).iter_errors(record))
    assert list(validator(SCHEMA).iter_errors({**record, "equal": "yes"}))
    assert list(validator(SCHEMA).iter_errors({**record, "surplus": 1}))


# -- in a browser ------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(
    browser.BROWSER is None, reason=f"none of {', '.join(browser.NAMES)} is installed: pages are only parsed"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def shown(window: browser.Page, tmp_path: Path) -> browser.Page:
    """The page of a 7B model, wide and light, with nothing said yet."""
    path = tmp_path / "page.html"
    report.write(llama(), path)
    window.look(1280)
    window.complaints.clear()
    window.requests.clear()
    window.open(path)
    return window


CELLS = "[...document.querySelectorAll('.heat tbody td')]"
FIRST = (
    "[...document.querySelectorAll('#modules-table tbody tr')].filter(r => !r.hidden).map(r => r.cells[{}].dataset.v)"
)


@in_a_browser
def test_a_browser_shows_it_without_a_word_and_asks_for_nothing(shown: browser.Page) -> None:
    shown.look(1280, dark=True)
    shown.look(1280)
    assert shown.complaints == []
    assert [r for r in shown.requests if not r.startswith("file:")] == [] and len(shown.requests) == 1
    assert shown.js("document.title") == "Different: adapterpack verify"
    style = "getComputedStyle(document.querySelector('.verdict')).borderTopColor"
    assert shown.js(style) == "rgb(168, 58, 0)", "the style sheet was refused"


@in_a_browser
def test_the_heatmap_has_a_cell_for_every_module_in_its_colour(shown: browser.Page) -> None:
    assert shown.js(f"{CELLS}.length") == 224
    assert shown.js(f"{CELLS}.filter(c => c.matches('.bad')).length") == 2
    assert shown.js(f"{CELLS}.filter(c => c.matches('.elost')).map(c => c.innerText)") == ["▲ missing module"]
    assert shown.js(f"{CELLS}.every(c => c.title && c.innerText.trim())")
    by_level: dict[str, str] = {}
    for dark, theme in ((False, palette.LIGHT), (True, palette.DARK)):
        shown.look(1280, dark=dark)
        lit = f"{CELLS}.filter(c => !c.matches('.elost'))"
        pairs = shown.js(f"{lit}.map(c => [c.className, getComputedStyle(c).backgroundColor])")
        for name, colour in pairs:
            level = int(name.split()[0].removeprefix("e"))
            want = theme[level]
            assert colour == f"rgb({int(want[1:3], 16)}, {int(want[3:5], 16)}, {int(want[5:], 16)})"
            by_level[name] = colour
    assert len(by_level) > 4


@in_a_browser
def test_keys_alone_sort_the_table_and_screen_readers_are_told(shown: browser.Page) -> None:
    shown.js("document.querySelector('#modules-table th:nth-child(3) button').focus()")
    numbers = [float(x) for x in shown.js(FIRST.format(2))]
    shown.press("Enter")
    assert [float(x) for x in shown.js(FIRST.format(2))] == sorted(numbers, reverse=True)
    shown.press("Enter")
    assert [float(x) for x in shown.js(FIRST.format(2))] == sorted(numbers)
    sorts = "[...document.querySelectorAll('#modules-table th[aria-sort]')].map(h => [h.cellIndex, h.ariaSort])"
    assert shown.js(sorts) == [[2, "ascending"]]
    assert shown.js("document.getElementById('modules-status').textContent") == "Sorted by largest error, ascending."
    shown.press("Tab", shift=True)
    shown.press("Tab", shift=True)
    shown.press("Enter")
    names = shown.js(FIRST.format(0))
    assert names[0].startswith("model.layers.0.") and names[-1].startswith("model.layers.31.")
    layers = [int(n.split(".")[2]) for n in names]
    assert layers == sorted(layers), "numbers in names count as numbers"
    assert shown.complaints == []


@in_a_browser
def test_the_search_leaves_what_is_looked_for_and_a_link_finds_what_it_hid(shown: browser.Page) -> None:
    shown.js("document.getElementById('modules-search').focus()")
    shown.type("layers.7.MLP")
    assert sorted(n.split(".")[4] for n in shown.js(FIRST.format(0))) == ["down_proj", "gate_proj", "up_proj"]
    assert shown.js("document.getElementById('modules-status').textContent") == "3 of 223 modules shown."
    shown.js("document.querySelector('.heat td.bad a').focus()")
    shown.press("Enter")
    shown.js("new Promise(done => setTimeout(done, 200))")
    assert len(shown.js(FIRST.format(0))) == 223
    assert shown.js("document.querySelector('#modules-table tr:target').id") in ("m0", "m1")


@in_a_browser
def test_everything_that_does_something_is_reached_by_the_tab_key_and_shows_it(shown: browser.Page) -> None:
    reachable = """[...document.querySelectorAll('a[href], button, input, [tabindex="0"]')]"""
    wanted = shown.js(f"{reachable}.map((e, n) => (e.dataset.n = n, n)).length")
    shown.press("Tab")
    assert shown.js("document.activeElement.className") == "skip"
    assert shown.js("document.activeElement.getBoundingClientRect().top") >= 0, "the skip link shows itself"
    seen = []
    for _ in range(wanted):
        seen.append(shown.js("document.activeElement.dataset.n"))
        assert shown.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        shown.press("Tab")
    assert [int(n) for n in seen] == list(range(wanted))


@in_a_browser
@pytest.mark.parametrize("name", pages())
@pytest.mark.parametrize("width", [320, 375, 800, 1280])
def test_no_page_is_wider_than_its_window(name: str, width: int, window: browser.Page, tmp_path: Path) -> None:
    path = report.write(pages()[name], tmp_path / "page.html")
    window.look(width)
    window.complaints.clear()
    window.open(path)
    assert window.js("document.documentElement.scrollWidth") <= width
    pictures = "[...document.querySelectorAll('.w1060, .w660, .w330')].filter(e => e.checkVisibility())"
    assert window.js(f"{pictures}.length") in (0, 1)
    assert window.complaints == []


@in_a_browser
def test_paper_gets_light_colours_all_rows_and_no_menu(shown: browser.Page, tmp_path: Path) -> None:
    shown.look(1000, dark=True, media="print")
    assert shown.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    box = "document.querySelector('.tall')"
    assert shown.js(f"{box}.scrollHeight <= {box}.clientHeight + 1")
    assert shown.screenshot(tmp_path / "x.png").startswith(b"\x89PNG")
