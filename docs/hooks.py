"""Bring pages from outside docs/ into the site: the README, results, recipes and files that pages link to.

A link in any Markdown file is relative to that file, as code hosts show it. Here it is led to the page that
the site has for its target: Markdown becomes a page, source code a page that shows it, anything else a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
"""Pages of the site in any case; others are those that pages link to."""

SHOWN = {".py": "python", ".yaml": "yaml", "": "text"}
"""The source files that get a page of their own, by suffix, with their language."""

_CODE = re.compile(r"^(```.*?^```|    \S.*?$)|(`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=[)\s])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and whatever they link to, page by page."""
    root, docs = _root(config), Path(config.docs_dir)
    waiting = [root / name for name in PAGES]
    waiting += [Path(file.abs_src_path or "") for file in files.documentation_pages()]
    seen: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if not source.is_relative_to(docs):
            files.append(_file(source, root, config))
        if source.suffix == ".md":
            waiting += [target for target in _targets(source) if target.is_relative_to(root)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each link to the site's page or file for its target. One without a target is reported."""
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])  # a page without a section has nothing to list beside it
    if page.file.abs_src_path is None:
        return markdown  # source code
    source, root, docs = Path(page.file.abs_src_path), _root(config), Path(config.docs_dir)
    here = PurePosixPath(page.file.src_uri).parent

    def led(link: re.Match[str]) -> str:
        target = _resolved(source, link["path"])
        if target is None or not target.is_relative_to(root):
            return link[0]
        inside = target.is_relative_to(docs)
        uri = target.relative_to(docs).as_posix() if inside else _uri(target, root)
        return os.path.relpath(uri, here) + (link["anchor"] or "")

    return _outside_code(markdown, led)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent


def _uri(path: Path, root: Path) -> str:
    """Return where the source of a page or file from outside docs/ is in the site."""
    inside = path.relative_to(root)
    if path.suffix == ".md":
        name = "index.md" if path.name == "README.md" else path.name.lower()
        return inside.with_name(name).as_posix()
    return f"{inside.as_posix()}.md" if path.suffix in SHOWN else inside.as_posix()


def _file(path: Path, root: Path, config: MkDocsConfig) -> File:
    if path.suffix == ".md" or path.suffix not in SHOWN:
        return File.generated(config, _uri(path, root), abs_src_path=str(path))
    name = path.relative_to(root).as_posix()
    code = path.read_text(encoding="utf-8").rstrip()
    content = f"# {name}\n\n````{SHOWN[path.suffix]}\n{code}\n````\n"
    return File.generated(config, _uri(path, root), content=content)


def _targets(source: Path) -> Iterator[Path]:
    """The files that a Markdown file links to."""
    found: list[Path] = []

    def seen(link: re.Match[str]) -> str:
        if target := _resolved(source, link["path"]):
            found.append(target)
        return link[0]

    _outside_code(source.read_text(encoding="utf-8"), seen)
    yield from found


def _resolved(source: Path, link: str) -> Path | None:
    """Return the file that a link in `source` leads to (for a folder its README), or None."""
    target = (source.parent / link).resolve()
    if target.is_dir():
        target = target / "README.md"
    return target if target.is_file() else None


def _outside_code(markdown: str, change: Callable[[re.Match[str]], str]) -> str:
    """Apply `change` to each link outside code."""
    parts, at = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(change, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, _LINK.sub(change, markdown[at:])])
