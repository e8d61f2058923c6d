"""Write the test vectors under formats/<id>/vectors/.

usage: python tools/make_vectors.py        rewrites every case (the old ones are removed first)
       python tools/make_vectors.py NAME   only the cases whose "<id>/<case>" contains NAME

tools/vectors/ holds the cases, one module for each method: its docstring says how to add one, that of its module
`common` what a case consists of and how its numbers are made.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT saves `target_modules` as an unordered set
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    from vectors.common import main

    main(*sys.argv[1:])
