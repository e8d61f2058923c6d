"""`python -m adapterpack.cli`."""

from adapterpack.cli import main

main()
