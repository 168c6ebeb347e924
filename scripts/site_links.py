"""A hook of mkdocs: links from the documents to files of the repository also work in the site.

`../studies/quickstart.toml` leads out of docs/. The site gets a copy of such a file under `repository/`. A link to a
page of Markdown out there, such as the README, keeps its text only.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return a page with the links that lead out of docs/ changed; mkdocs calls this."""
    folder, root = posixpath.dirname(page.file.src_uri), Path(config.docs_dir).parent

    def inside(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match.group()
        if path.endswith(".md"):
            return text
        copy = f"repository/{path}"
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(root / path)))
        return f"[{text}]({posixpath.relpath(copy, folder or '.')})"

    return LINK.sub(inside, markdown)
