"""``python -m vlmprune.cli``: the same as the console script."""

from vlmprune.cli.main import main

main()
