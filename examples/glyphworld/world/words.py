"""The words of the world: what can be seen in a scene, and the vocabulary of the questions and answers."""

_SHAPES = (
    "circle square triangle diamond star cross ring heart anchor plane umbrella phone note knight moon flower"
)
SHAPES = _SHAPES.split()
COLORS = {
    "red": (215, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (238, 222, 60),
    "green": (50, 165, 60),
    "cyan": (60, 205, 215),
    "blue": (45, 75, 215),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
COLOR_NAMES = list(COLORS)
SIZES = {"small": (11, 13), "medium": (17, 19), "large": (24, 27)}  # longer side in pixels, both included
SIZE_NAMES = list(SIZES)
LETTERS = list("ABCDEFGHJKLMNPRSTUVXYZ")  # without those that a 10 pixel sprite makes look alike

FAMILIES = ("box", "cell", "at", "color", "shape", "count", "exist", "read")
NUMBERS = 33  # 0 to 32: counts, cells and box corners

# The order is the token id: a trained checkpoint depends on it.
_SENTENCE = (
    "USER: ASSISTANT: where is the what color shape how many objects there a are locate find box of "
    "sign say does word read in image at row col ? . yes no object which it"
)
_VISIBLE = [*COLOR_NAMES, *SIZE_NAMES, *SHAPES, *map(str, range(NUMBERS)), *LETTERS]
_WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", *_SENTENCE.split(), *_VISIBLE]
VOCABULARY = [*_WORDS, *(f"<r{i}>" for i in range(-len(_WORDS) % 16))]
TOKEN_ID = {word: i for i, word in enumerate(VOCABULARY)}
