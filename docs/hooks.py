"""For mkdocs: links that leave docs/ lead to the repository if mkdocs.yml has a repo_url, and are plain words if not.

A target that is not in the repository is a warning, so that `mkdocs build --strict` fails.
"""

import logging
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s#]+)\)")
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown, page, config, files):
    """mkdocs's own event: the page's text before it is rendered."""

    def led(match):
        words, target = match.groups()
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which the repository lacks", page.file.src_uri, target)
        return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{target})" if config.repo_url else words

    return OUTSIDE.sub(led, markdown)
