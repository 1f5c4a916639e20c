"""What the letters in the policies' formulas stand for: one legend for all of them."""

from __future__ import annotations

from collections.abc import Mapping

SYMBOLS: Mapping[str, str] = {
    "n": "visual tokens that enter, chosen from together: those of a prompt, or of each image or crop (spend)",
    "k": "how many of them stay: ⌊keep · n⌋ of a share, keep for each image of a number, at least 1; crops share evenly",
    "k(then)": "the same by another setting, here by then",
    "K": "the stage's decoder layer, the first one that sees only what stays",
    "l": "a layer of the decoder, or of the vision tower (there -2 is the last but one)",
    "h": "a head of that layer",
    "i": "any row, or another visual token",
    "j": "a visual token",
    "t": "a text token behind the last image",
    "last": "the prompt's last row",
    "CLS": "the CLS row of the vision tower; in one without CLS the mean over all rows i",
    "s_j": "the score of token j; of equal scores that of the earlier token is the higher",
    "x_j": "the hidden row of token j that enters the stage; before the language model its projected feature",
    "e_j": "the input embedding of token j; of a visual token its projected feature",
    "v_j": "the tower's feature of token j, which the projector gets",
    "u_j[l][h]": "the key of token j in the tower; of a token of several patches the mean, as with V",
    "k_j[l][h]": "the key of token j in the decoder, behind RoPE",
    "z[l][h, i, j]": "the decoder's attention logit: query of row i times key of token j, scaled",
    "A[l][h, i, j]": "the decoder's attention that row i pays to token j: softmax of z over all keys that i sees",
    "V[l][h, i, j]": "the tower's attention that row i pays to token j: softmax over all its keys",
    "cos(x_i, x_j)": "the cosine of two vectors",
}
"""Symbol to meaning, in the order of a legend. A formula itself defines the other letters that it uses (``C = ...``)."""
