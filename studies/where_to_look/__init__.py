"""Where should a model look: a coarse view first, or one of the published choices, at equal FLOPs."""
