"""Exact attention that also gives the log-sum-exp: ``attn_implementation="vlmprune"``."""
