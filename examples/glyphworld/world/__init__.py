"""The synthetic world: words, sprites, scenes by seed, and questions whose answers are known."""
