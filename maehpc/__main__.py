"""`python -m maehpc` is the command `maehpc`."""

from maehpc.cli.main import main

main()
