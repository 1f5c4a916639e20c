"""The command line: run, eval, list, info. Imports transformers only where a model is needed."""
