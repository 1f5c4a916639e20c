"""The command line: run, eval, bench, check, list, info. Imports transformers only where a model is needed."""
