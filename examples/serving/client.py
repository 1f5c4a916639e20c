"""Asks a server about a picture, with OpenAI's client; a request may bring a budget of its own.

python examples/serving/client.py "locate the green phone ." --image examples/glyphworld/images/scene_70001.png
python examples/serving/client.py "locate the green phone ." --image ... --keep 32
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI


def main() -> None:
    """Print the answer, and what it cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--image", type=Path, required=True, help="a PNG")
    parser.add_argument(
        "--keep", type=budget, help="visual tokens (32) or a share (0.1); default: the server's"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="glyphworld")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    own = {} if args.keep is None else {"mm_processor_kwargs": {"vlmprune_keep": args.keep}}
    client = OpenAI(base_url=args.url, api_key="none")
    try:
        answer = client.chat.completions.create(
            model=args.model,
            messages=message(args.question, args.image.read_bytes()),
            max_tokens=args.max_tokens,
            temperature=0,
            extra_body=own,
        )
    except APIStatusError as error:  # more than the server allows is a 400
        raise SystemExit(error.message) from None
    print((answer.choices[0].message.content or "").strip())
    if answer.usage is not None:
        print(f"{answer.usage.prompt_tokens} prompt tokens, {answer.usage.completion_tokens} of the answer")


def message(question: str, png: bytes) -> list[Any]:
    """A picture and a question about it, as OpenAI's chat takes them."""
    picture = "data:image/png;base64," + base64.b64encode(png).decode()
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def budget(text: str) -> int | float:
    """``32`` is tokens, ``0.1`` a share."""
    return int(text) if text.isdecimal() else float(text)


if __name__ == "__main__":
    main()
