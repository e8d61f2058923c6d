"""What `check` looks for, and what `check --fix` can mend: one file for each side of an adapter.

`fields` is PEFT's table of config fields, `configs` holds a config against it and against the tensors, `naming` the
keys, `values` the values, `weight` the bytes, `scope` which modules are adapted and how strongly; `mending` repairs.
"""
