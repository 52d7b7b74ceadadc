"""`python -m steploop` is the program `steploop`."""

from .cli import main

main()
