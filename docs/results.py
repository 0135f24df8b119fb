"""A hook of mkdocs: the pages and plots under benchmarks/results/ are part of the site, under results/.

In the repository docs/ links to them as ../benchmarks/results/, so that its pages are whole there, too.
"""

from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*")):
        if path.suffix in (".svg", ".txt") or path.name == "README.md":
            name = path.relative_to(ROOT / "benchmarks").as_posix()
            file = File(name, str(ROOT / "benchmarks"), config.site_dir, config.use_directory_urls)
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown, page, **others):
    return markdown.replace("../benchmarks/results/", "results/")
