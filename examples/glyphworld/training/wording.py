"""How a question is put to a model: the full prompt as text, and as the token ids that training packs."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlavaProcessor
from world.questions import Question


def full_prompt(processor: LlavaProcessor, question: str, kind: str = "image") -> str:
    """``question`` about one picture, or "video", in the frame of the chat template, up to where the answer begins."""
    content = [{"type": kind}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class Wording:
    """Questions and answers as token ids, by a processor's chat template and tokenizer: what ``generate`` will meet.

    Attributes:
        prefix: the ids in front of the picture, or "video", the same in every prompt.
    """

    def __init__(self, processor: LlavaProcessor, kind: str = "image") -> None:
        self._tokenizer = processor.tokenizer
        token = processor.image_token_id if kind == "image" else processor.video_token_id
        self._frame = full_prompt(processor, "{}", kind)
        ids = self._ids(self._frame)
        self.prefix = tuple(ids[: ids.index(token)])

    def encode(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids after the picture up to where the answer begins, and those of the answer with its end.

        Raises:
            ValueError: the tokenizer joins the end of the prompt to the answer, so no prompt could ask for it.
        """
        prompt = self._frame.format(" ".join(question.words))
        asked, whole = self._ids(prompt), self._ids(f"{prompt} {' '.join(question.answer)}")
        if whole[: len(asked)] != asked:
            raise ValueError(f"tokenizer: expected a token to begin with the answer of {prompt!r}, got none")
        return asked[len(self.prefix) + 1 :], [*whole[len(asked) :], self._tokenizer.eos_token_id]

    def tokens(self, words: Sequence[str]) -> list[int]:
        """Token ids of words that stand by themselves."""
        return self._ids(" ".join(words))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
