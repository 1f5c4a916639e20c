"""ACCM, tested at equal FLOPs against what needs no words."""
