"""VeRA (Kopiczko et al. 2023): two frozen random projections for all modules, two trained vectors for each.

    delta W = (lambda_b[:, None] * B[:out]) @ (lambda_d[:, None] * A[:, :in])

Encodings: `projection` holds A and B; `seed` leaves them to `projection_prng_key`. The whole of it stands in
`_vectors`. Reference: peft/tuners/vera/model.py and layer.py (`get_delta_weight`).
"""

from __future__ import annotations

from adapterpack.methods._vectors import Vectors

peft_type = "VERA"
keep_dtype: frozenset[str] = frozenset()
_method = Vectors("VeRA", "vera_")
keys = _method.keys
parse, changes, ranks = _method.parse, _method.changes, _method.ranks
recipes, findings, edges = _method.recipes, _method.findings, _method.edges
