"""The parts of the FEATHER study: which methods, what they keep, what RoPE does to the score. ``study.py`` runs them."""
