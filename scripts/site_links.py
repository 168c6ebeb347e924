"""A hook of mkdocs: links from the documents to files of the repository also work in the site.

`../studies/quickstart.toml` leads out of docs/. The site gets a copy of such a file under `repository/`, and the pages
of Markdown at the repository's root, such as the README, as pages there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

COPIES = "repository/"  # in the site; their links are relative to the repository's root
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages of Markdown at the repository's root; mkdocs calls this."""
    for path in sorted(Path(config.docs_dir).parent.glob("*.md")):
        files.append(File.generated(config, COPIES + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return a page with the links that lead out of docs/, or into it, changed; mkdocs calls this."""
    uri, root = page.file.src_uri, Path(config.docs_dir).parent
    folder = posixpath.dirname(uri)
    written_in = "" if uri.startswith(COPIES) else posixpath.join("docs", folder)

    def in_site(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(written_in, target))
        place = path.removeprefix("docs/") if path.startswith("docs/") else COPIES + path
        if files.get_file_from_path(place) is None and not path.startswith("docs/"):
            files.append(File.generated(config, place, abs_src_path=str(root / path)))
        return f"[{text}]({posixpath.relpath(place, folder or '.')}{anchor or ''})"

    return LINK.sub(in_site, markdown)
