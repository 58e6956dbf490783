"""``python -m longspan``: the command line, where its script is not on the path."""

from longspan.cli.app import main

main()
