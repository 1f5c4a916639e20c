"""What mkdocs is told beyond mkdocs.yml: the tree of pages is that of the repository, with pages that are made beside it.

Paths in mkdocs.yml and links in pages are paths in the repository. In the navigation METHODS and OPS stand for the pages that
are made of the registry and of ``vlmprune.ops``, REFERENCE for those of the public modules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from sitepages import methods, ops, reference
from sitepages.dialect import to_python_markdown
from sitepages.tree import ROOT, collect, retarget

PLACEHOLDERS = {"METHODS": methods.navigation, "OPS": ops.navigation, "REFERENCE": reference.navigation}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made into the navigation."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Let the files of the repository, and the pages that are made, take the place of those of docs_dir."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    gallery, drawn = _gallery(config)
    made = methods.pages(drawn) | ops.pages() | reference.pages()
    there, sources = collect(made, [*_paths(config.nav), *_below_docs()])
    for path, text in (made | sources).items():
        files.append(File.generated(config, path, content=text))
    there |= {f"methods/{picture.name}": picture for picture in sorted(gallery.glob("*.webp"))}
    for path, file in there.items():
        files.append(File.generated(config, path, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Read GitHub's Markdown, and lead links to where things are on the site."""
    path = page.file.src_uri
    if path == methods.INDEX:
        page.meta["hide"] = ["toc"]
        markdown = methods.with_own_table(markdown, _gallery(config)[1])
    elif path == ops.INDEX:
        markdown = ops.linked(markdown)
    return to_python_markdown(retarget(path, markdown))


def _gallery(config: MkDocsConfig) -> tuple[Path, dict[str, Any]]:
    """The folder that ``vlmprune gallery`` wrote, and its ``gallery.json``."""
    folder = ROOT / config.extra["gallery"]
    if not (folder / "gallery.json").is_file():
        raise PluginError(f"extra.gallery: expected a folder of `vlmprune gallery`, got {folder}")
    return folder, json.loads((folder / "gallery.json").read_text())


def _filled(nav: Any) -> Any:
    """The navigation with the pages that are made in the place of what stands for them."""
    if isinstance(nav, dict):
        return {title: _filled(entry) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    known = [PLACEHOLDERS.get(entry) if isinstance(entry, str) else None for entry in nav]
    return [
        part
        for entry, make in zip(nav, known, strict=True)
        for part in ([_filled(entry)] if make is None else make())
    ]


def _paths(nav: Any) -> Iterator[str]:
    """Every path in the navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _paths(entry)


def _below_docs() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
