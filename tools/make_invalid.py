"""Write the malformed inputs under formats/<id>/invalid/, and what each of them must give.

usage: python tools/make_invalid.py        rewrites every case (the old ones are removed first)
       python tools/make_invalid.py NAME   only the cases whose "<id>/<case>" contains NAME

tools/vectors/ holds the cases, one module for each method: its docstring says how to add one, that of its module
`hostile` what a case consists of. Those of packs and of quantised bases are written by tools of their own.
"""

from __future__ import annotations

import sys

from vectors.hostile import main

if __name__ == "__main__":
    main(*sys.argv[1:])
