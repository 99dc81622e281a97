"""`python -m dataflex.cli`, and the program that torchrun starts."""

from dataflex.cli.app import main

main()
