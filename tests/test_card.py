"""README.md: what the user wrote stays byte for byte, and what we add is YAML that says what it should."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapterpack import card
from adapterpack.errors import InvalidFile

USER = """---
# a comment that stays
language:   en   # and this one
tags:
- "my tag"   # quoted
- 'other'
license: mit
"model-index":
  - name: x
    results: []

widget:
    - text: |
        ---
        tags: no
---
# Title

Body with --- and tags: here.
"""


def test_only_the_fields_that_change_are_touched() -> None:
    mended = card.with_fields(USER, {"license": "apache-2.0", "library_name": "peft"})
    before, after = USER.splitlines(), mended.splitlines()
    assert [line for line in after if line not in before] == ["license: apache-2.0", "library_name: peft"]
    assert [line for line in before if line not in after] == ["license: mit"]
    assert card.fields(mended) == {**card.fields(USER), "license": "apache-2.0", "library_name": "peft"}


def test_nothing_to_change_changes_nothing() -> None:
    assert card.with_fields(USER, {"license": "mit"}) == USER


def test_a_list_is_replaced_as_a_whole() -> None:
    mended = card.with_fields(USER, {"tags": ["a", "b: c"]})
    assert card.fields(mended)["tags"] == ["a", "b: c"]
    assert "license: mit\n" in mended and "# a comment that stays" in mended


@pytest.mark.parametrize("text", ["", "# Title\n", "---\nno front matter, it does not end\n", "a\n---\nb: c\n---\n"])
def test_front_matter_is_put_before_a_card_that_has_none(text: str) -> None:
    mended = card.with_fields(text, {"license": "mit"})
    assert card.fields(mended) == {"license": "mit"}
    assert mended.endswith(text)


def test_line_ends_stay(subtests: Any = None) -> None:
    text = "---\r\nlicense: mit\r\n---\r\nBody\r\n"
    mended = card.with_fields(text, {"license": "x", "tags": ["a"]})
    assert mended == "---\r\nlicense: x\r\ntags:\r\n- a\r\n---\r\nBody\r\n"


@pytest.mark.parametrize(
    "front",
    [
        "{license: mit, tags: [a]}\n",
        "license: mit\nlicense: x\n",
        "? license\n: mit\n",
        "tags: [a,\nb]\nlicense: mit\n",
    ],
)
def test_strange_yaml_is_written_anew_and_says_the_same(front: str) -> None:
    text = f"---\n{front}---\nBody\n"
    before = card.fields(text)
    mended = card.with_fields(text, {"license": "apache-2.0"})
    assert card.fields(mended) == {**before, "license": "apache-2.0"}
    assert mended.endswith("---\nBody\n")


@pytest.mark.parametrize(
    "front",
    [
        "a: &x [1]\nb: *x\n",
        "- a\n",
        "a: [\n",
        "a: !!python/object/apply:os.system [id]\n",
        "[" * 5000 + "\n",
        "a: " + "x" * 70_000 + "\n",
    ],
)
def test_hostile_front_matter_is_refused(front: str) -> None:
    with pytest.raises(InvalidFile):
        card.fields(f"---\n{front}---\n")


def test_our_part_replaces_itself_and_nothing_else() -> None:
    once = card.with_section("# Mine\n\ntext\n", "## Adapter\n\none")
    twice = card.with_section(once + "\nmore of mine\n", "## Adapter\n\ntwo")
    assert twice == once.replace("one", "two") + "\nmore of mine\n"
    assert card.section(twice) == "## Adapter\n\ntwo"


_names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
_values = st.one_of(
    st.text(max_size=12), st.integers(-9, 9), st.booleans(), st.none(), st.lists(st.text(max_size=6), max_size=3)
)


@given(st.dictionaries(_names, _values, max_size=5), st.dictionaries(_names, _values, max_size=3))
def test_a_field_is_what_it_was_or_what_it_was_set_to(old: dict[str, Any], new: dict[str, Any]) -> None:
    front = yaml.safe_dump(old, sort_keys=False, allow_unicode=True) if old else ""
    text = f"---\n{front}---\nBody\n"
    mended = card.with_fields(text, new)
    assert card.fields(mended) == {**old, **new}
    assert mended.endswith("Body\n")
