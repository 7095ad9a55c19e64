"""For MkDocs: the reference follows from the registries, and results/published/ becomes pages of the site.

Links to files outside docs/ are written for the repository. Those to ../results/published/ are changed here. The site
has no other files of the repository, so that their names stay without a link.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs_registry import reference


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.extra.pop("polyfills", None)  # a script on another server, which the plugin `offline` asks for
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    results = Path(config.config_file_path).parent / "results"
    for pattern in ("*/README.md", "*/figures/*.png"):
        for path in sorted(results.glob(f"published/{pattern}")):
            uri = path.relative_to(results).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    if page.file.src_uri == "reference.md":
        return reference(markdown)
    markdown = markdown.replace("](../results/published/", "](published/")
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./(?:src|conf|examples|CONTRIBUTING)[^)]*\)", r"\1", markdown)
