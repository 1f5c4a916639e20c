"""What a question is about, as the command line names it: images, or the frames of one clip. Read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlmprune.errors import check
from vlmprune.images import open_clip, open_rgb


class Pictures(NamedTuple):
    """Files, and the pictures in them: one each, or with ``clip`` the frames of the one file or folder."""

    paths: tuple[Path, ...]
    images: list[Image.Image]
    clip: bool = False


def read_pictures(images: Sequence[Path], video: Path | None) -> Pictures:
    """The images, or the clip. Raises InputError for none, both, or what cannot be read."""
    if video is None:
        check(bool(images), "--image", "a picture to ask about (or --video, a clip)", "none")
        return Pictures((*images,), [open_rgb(path, "--image") for path in images])
    check(not images, "--image", "none beside --video", " ".join(map(str, images)))
    return Pictures((video,), open_clip(video, "--video"), clip=True)
