"""Pages of the site that are files of the repository: the README as its index, and the changelog."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, with links as they are seen from `docs/`; of files that the site lacks the text stays."""
    root = Path(config.config_file_path).parent

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        target = PAGES.get(target, target).removeprefix("docs/")
        return f"`{text}`" if (root / target).is_file() else f"[{text}]({target})"

    for source, page in PAGES.items():
        content = re.sub(r"\[([^]]*)\]\(([^)#:]+)\)", link, (root / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of `docs/` to the README lead to the index."""
    return markdown.replace("](../README.md", "](index.md")
