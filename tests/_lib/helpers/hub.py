"""A Hugging Face cache in which the ids that the docs name are the small trained model, as deep as LLaVA-1.5.

So examples run as they stand, offline and in little time: layers 8 and 16 are there, an image is 196 visual tokens (where
LLaVA-1.5 has 576), and the answers are the small model's.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

GLYPHWORLD = Path(__file__).parents[3] / "examples" / "glyphworld"
IDS = (
    "llava-hf/llava-1.5-7b-hf",
    "OpenGVLab/InternVL3-1B-hf",
    "OpenGVLab/InternVL3-8B-hf",
)
DEPTHS = {
    "text_config": ("language_model.model.layers.", 32),
    "vision_config": ("vision_tower.encoder.layers.", 24),
}
"""Part of the configuration -> where its layers are in the weights, and how many LLaVA-1.5 has."""
LAST = ("self_attn.o_proj", "mlp.down_proj", "self_attn.out_proj", "mlp.fc2")
"""What a layer adds to its input comes from these."""


def make_hub(home: Path) -> None:
    """Fill ``home``, for the environment variable ``HF_HOME``."""
    snapshot = home / "deep"
    deepen(GLYPHWORLD / "checkpoint", snapshot)
    for name in IDS:
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / ("0" * 40)).symlink_to(snapshot)


def deepen(checkpoint: Path, out: Path) -> None:
    """The same model in more layers: behind each trained one copies that read as it does and add nothing."""
    shutil.copytree(checkpoint, out)
    config, weights = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    for part, (prefix, depth) in DEPTHS.items():
        times = depth // config[part]["num_hidden_layers"]
        config[part]["num_hidden_layers"] = depth
        trained = {key: weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        for key, weight in trained.items():
            layer, _, name = key.removeprefix(prefix).partition(".")
            for copy in range(times):
                silent = copy and name.rpartition(".")[0] in LAST
                weights[f"{prefix}{int(layer) * times + copy}.{name}"] = weight.mul(0 if silent else 1)
    (out / "config.json").write_text(json.dumps(config))
    save_file(weights, out / "model.safetensors", {"format": "pt"})
