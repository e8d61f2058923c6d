"""What the Hub checks in a model card's front matter, as far as its documentation says so.

PyYAML comes with huggingface_hub, which needs it for the same front matter.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)(?:^---[ \t]*$)", re.DOTALL | re.MULTILINE)
_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 gemma grok2-community unknown other
"""


def front_matter(text: str) -> Any:
    """The parsed front matter; None if there is none."""
    found = _FRONT_MATTER.match(text)
    return None if found is None else yaml.safe_load(found[1])


def validate(text: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) for the text of a README.md."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {str(error).splitlines()[0]}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["The metadata must be a mapping"], []
    errors = []
    for key in ("library_name", "pipeline_tag", "base_model_relation", "license_name", "license_link"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "language", "base_model", "license"):
        if key in data and not _strings(data[key]):
            errors.append(f'"{key}" must be a string or an array of strings')
    if "tags" in data and isinstance(data["tags"], str):
        errors.append('"tags" must be an array')
    errors += [
        f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for name in _listed(data.get("base_model"))
        if not _REPO.fullmatch(name)
    ]
    errors += [
        f'"license" with value "{x}" is not one that is known'
        for x in _listed(data.get("license"))
        if x not in _LICENSES.split()
    ]
    if isinstance(relation := data.get("base_model_relation"), str) and relation not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(_RELATIONS)}')
    return errors, []


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))


def _listed(value: Any) -> list[str]:
    """A string, or the strings of a list; what else it is was said already."""
    return [value] if isinstance(value, str) else [x for x in value or [] if isinstance(x, str)] if value else []
