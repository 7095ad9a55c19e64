"""For MkDocs: results/published/, which lies outside docs/, becomes pages of the site.

Links to it are written as they are right in the repository, ../results/published/..., and are turned here.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


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


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace("](../results/published/", "](published/")
