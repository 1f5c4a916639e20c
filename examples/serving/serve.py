"""Starts vLLM's OpenAI server on glyphworld's checkpoint, with pruning or without; prints the command it becomes.

    python examples/serving/serve.py --policy divprune:keep=64,positions=pack
    python examples/serving/serve.py --policy none --port 8001 --enforce-eager

A policy is written as on vlmprune's command line. Options that are not this script's own are vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from vlmprune import policy_from
from vlmprune.integrations.vllm import ARCHITECTURES

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "glyphworld" / "checkpoint-576"
NAME = "glyphworld"
"""What clients call the model."""

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""Unless the environment says otherwise: a GiB for keys and values, and one thread, which is plenty for this model."""


def main() -> None:
    """Become the server, so that whoever ends this process ends it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--policy", default="divprune:keep=64,positions=pack", help="as on vlmprune's command line, or none"
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a folder; 576 visual tokens")
    parser.add_argument("--port", type=int, default=8000)
    args, vllm = parser.parse_known_args()
    words = command(args.policy, args.checkpoint, args.port, vllm)
    settings = {name: value for name, value in CPU.items() if name not in os.environ}
    shown = [f"{name}={value}" for name, value in settings.items()]
    print(shlex.join([*shown, *words]), flush=True)
    os.execve(words[0], words, {**os.environ, **settings})


def command(policy: str, checkpoint: Path, port: int, vllm: Sequence[str] = ()) -> list[str]:
    """What starts the server.

    Args:
        policy: text of a policy, or "none" for vLLM's own class, which has a copy of the checkpoint made.
        checkpoint: as transformers saves it.
        port: of 127.0.0.1.
        vllm: further options of vLLM's.

    Raises:
        InputError: no such policy.
    """
    if policy == "none":
        pruning = []
        model = published(checkpoint, ROOT / "build" / "serving" / checkpoint.name)
    else:
        model = checkpoint
        family = json.loads((checkpoint / "config.json").read_text())["model_type"]
        chosen = policy_from(policy).to_dict()
        override = {"architectures": [ARCHITECTURES[family][0]], "vlmprune": chosen}
        # requests may bring budgets of their own, and with them any other setting of the image processor
        pruning = ["--hf-overrides", json.dumps(override), "--trust-request-mm-kwargs"]
    server = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]  # `vllm` fails in vllm-cpu
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [*server, "--model", str(model), "--served-model-name", NAME, *where, *pruning, *vllm]


def published(checkpoint: Path, copy: Path) -> Path:
    """A copy of a LLaVA checkpoint under the weights' published names, the only ones that vLLM's own class finds.

    transformers 5 saves a vision tower without ``vision_model`` in its names; our class reads both.
    """
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(checkpoint, copy)
    weights = load_file(checkpoint / "model.safetensors")
    there, wanted = "vision_tower.", "vision_tower.vision_model."
    renamed = {
        name.replace(there, wanted, 1) if wanted not in name else name: w for name, w in weights.items()
    }
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    return copy


if __name__ == "__main__":
    main()
