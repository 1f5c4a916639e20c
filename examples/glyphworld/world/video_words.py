"""The vocabulary of clips: that of pictures, whose token ids stay, and the words for time and motion."""

from __future__ import annotations

from world.words import VOCABULARY

VIDEO = "<video>"
FAMILIES = ("where", "place", "at", "when", "total", "count", "way", "mover", "exist")

# The order is the token id: a trained checkpoint depends on it. The six spare words of pictures come first.
_NEW = [VIDEO, "time", "when", "first", "last", "seen", "move", "up", "down", "left", "right"]
_WORDS = [*(word for word in VOCABULARY if not word.startswith("<r")), *_NEW]
CLIP_VOCABULARY = [*_WORDS, *(f"<r{i}>" for i in range(-len(_WORDS) % 16))]
CLIP_TOKEN_ID = {word: i for i, word in enumerate(CLIP_VOCABULARY)}
