"""What mkdocs calls: pages link to files of the repository, which are no part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that lead out of docs/ become the path in the repository, if that is there; else they stay, and fail the build."""

    def replaced(match: re.Match[str]) -> str:
        text, way = match.groups()
        target = (ROOT / "docs" / Path(page.file.src_uri).parent / way).resolve()
        if not target.exists() or not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
            return match.group(0)
        path = f"`{target.relative_to(ROOT)}`"
        return path if text.strip("`") in str(target) else f"{text} ({path})"

    return LINK.sub(replaced, markdown)
