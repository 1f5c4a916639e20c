"""What the task file points to: the scenes of a question, and whether it was answered rightly."""

from pathlib import Path

from PIL import Image

SCENES = Path(__file__).parents[3] / "examples" / "glyphworld" / "images"


def doc_to_visual(doc):
    return [Image.open(SCENES / name).convert("RGB") for name in doc["images"]]


def process_results(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
