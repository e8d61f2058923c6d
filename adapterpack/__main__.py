"""`python -m adapterpack`."""

from adapterpack.cli import main

main()
