"""The command line: run, list, info. Imports transformers only inside ``run``."""
