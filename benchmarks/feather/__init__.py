"""The parts of the FEATHER study: which methods, what they keep, what RoPE does to the score. ``feather_study.py`` runs them."""
