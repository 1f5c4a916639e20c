"""Pruning methods, one short file each: the published ones, and this project's own. ``registry`` knows their names."""
