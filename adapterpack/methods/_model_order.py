"""The order in which models define their modules: PEFT draws its random numbers in it, and no file says it.

What is listed here is the order of transformers 5 (`named_modules`). Layers go by number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

_GROUPS = (
    # Of a model: embeddings, then the body, then the head.
    "shared embedder embeddings embed_tokens wte word_embeddings token_embedding embed_in wpe embed_positions"
    " position_embeddings token_type_embeddings project_out project_in text_model vision_model encoder decoder"
    " transformer h stages layers shortcut layer block model bert roberta deberta distilbert gpt_neox"
    " pooler pre_classifier classifier score lm_head proj_out embed_out qa_outputs visual_projection text_projection",
    # Of a layer.
    "self_attn attn attention self_attention encoder_attn EncDecAttention SelfAttention intermediate mlp ffn"
    " DenseReluDense self output fc1 fc2",
    # Of attention and of the MLP; Phi-3 has o_proj before qkv_proj.
    "query key value query_proj key_proj value_proj q k v o q_lin k_lin v_lin out_lin lin1 lin2"
    " q_proj k_proj v_proj o_proj qkv_proj query_key_value dense out_proj dense_h_to_4h dense_4h_to_h"
    " c_attn c_fc c_proj fc_in fc_out gate_proj up_proj gate_up_proj down_proj wi wi_0 wi_1 wo",
)
_PLACE = {name: n for n, name in enumerate(" ".join(_GROUPS).split())}
_FIRST = {name.rstrip("0123456789"): place for name, place in reversed(_PLACE.items()) if name[-1].isdecimal()}
"""The place of the first of those that differ in a number alone: `fc1` and `fc2`."""
_QUERY_LAST = {"k_proj": "q_proj", "v_proj": "k_proj", "q_proj": "v_proj"}
"""BART and its kin, OPT, CLIP and GPT-J define k, v and q."""
_KIN_OF_BART = {"encoder", "decoder", "h"}


def in_order(names: Iterable[str]) -> tuple[list[str], bool]:
    """Module paths in the order of definition, and whether that order is known for all of them."""
    paths = sorted({tuple(name.split(".")) for name in names}, key=_key)
    # Where two names part, both must be known: what stands below one parent is ordered by its names.
    known = all(_known(x, y) for x, y in itertools.pairwise(paths))
    return [".".join(path) for path in paths], known


def _key(path: tuple[str, ...]) -> list[tuple[int, int, str, int]]:
    return [_place(path[:n], part) for n, part in enumerate(path)]


def _place(above: tuple[str, ...], part: str) -> tuple[int, int, str, int]:
    """Its kind (a number, known, unknown), its place, its name without a number, its number."""
    if part.isdecimal():
        return 0, int(part), "", 0
    if part in _QUERY_LAST and _KIN_OF_BART & set(above):
        part = _QUERY_LAST[part]
    stem = part.rstrip("0123456789")
    number = int(part[len(stem) :] or 0)
    if stem != part and stem in _FIRST:
        return 1, _FIRST[stem], "", number
    return (1, _PLACE[part], "", 0) if part in _PLACE else (2, 0, stem, number)


def _known(x: tuple[str, ...], y: tuple[str, ...]) -> bool:
    """Is it known which of two neighbours comes first?"""
    for n, (a, b) in enumerate(zip(x, y, strict=False)):
        if a != b:
            one, other = _place(x[:n], a), _place(x[:n], b)
            # Names that differ in a number alone are defined in its order.
            return (one[0] < 2 and other[0] < 2) or (one[:3] == other[:3] and one[3] != other[3])
    return True
