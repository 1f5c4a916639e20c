"""The page of ``vlmprune show`` as a Hugging Face Space, with the small example model beside it."""

import os
from pathlib import Path

from vlmprune.web.desk import Desk, shipped
from vlmprune.web.page import start

if __name__ == "__main__":
    sources, examples = shipped(Path(__file__).parent)
    desk = Desk(sources, examples, device="cpu", dtype="float32")
    start(desk, "0.0.0.0", int(os.environ.get("GRADIO_SERVER_PORT", "7860"))).block_thread()
