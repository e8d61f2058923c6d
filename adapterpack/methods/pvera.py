"""PVeRA (arXiv 2512.07703): VeRA whose inner vector is the mean of a distribution, with its variance beside it.

    delta W = (lambda_b[:, None] * B[:out]) @ (lambda_d[:r, None] * A[:r, :in])

Of A (2 r, max_in) and lambda_d (2 r,) the second half gives the variance: a forward pass in training, or with
`sample_at_inference`, draws from it; merging takes the mean. Encodings: `projection` holds A and B; `seed` leaves
them to `projection_prng_key`. The whole of it stands in `_vectors`.
Reference: peft/tuners/pvera/model.py and layer.py (`get_delta_weight`).
"""

from __future__ import annotations

from adapterpack.methods._vectors import Vectors

peft_type = "PVERA"
keep_dtype: frozenset[str] = frozenset()
_method = Vectors("PVeRA", "pvera_", halves=2)
keys = _method.keys
parse, changes, ranks = _method.parse, _method.changes, _method.ranks
recipes, findings, edges = _method.recipes, _method.findings, _method.edges
