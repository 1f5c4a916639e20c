"""The command line: run, eval, check, list, info. Imports transformers only where a model is needed."""
