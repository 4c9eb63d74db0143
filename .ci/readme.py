"""README.md is nbs/index.ipynb, rendered.

    python .ci/readme.py           writes README.md
    python .ci/readme.py --check   exit status 1 if README.md says something else
"""
import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n"
_directive = re.compile(r"^\s*#\|\s*(\w+)\s*:?\s*(\S*).*\n?", re.M)
_fence = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.M|re.S)
_link = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z]+:|[#/])([^)\s"']+)""")


def prepare(nb):
    "`nb` without front matter and hidden cells, directives applied and removed; pictures must be files."
    cells = []
    for cell in nb.cells:
        flags = dict(_directive.findall(cell.source)) if cell.cell_type=="code" else {}
        hidden = "hide" in flags or flags.get("include")=="false"
        if hidden or cell.cell_type=="raw" or cell.source.startswith("---\n"): continue
        if cell.cell_type=="code":
            cell.source = _directive.sub("", cell.source).strip("\n")
            if flags.get("output")=="false": cell.outputs = []
            if any(k.startswith("image/") for o in cell.outputs for k in o.get("data", {})):
                raise SystemExit(f"index.ipynb, cell {cell.id}: a picture in a README must be a file; save it under "
                                 "nbs/images/, show it with ![...](images/...) and put `#| output: false` here")
            if flags.get("echo")=="false": cell.metadata.transient = {"remove_source": True}
        cells.append(cell)
    nb.cells = cells
    nb.metadata.language_info = {"name": "python"}
    return nb


def relink(text, folder="nbs"):
    "Relative links as they are in `folder`, turned into links from the top; code is left alone."
    def top(m): return m[1] + posixpath.normpath(f"{folder}/{m[2]}")
    parts = _fence.split(text)
    return "".join(p if i%2 else _link.sub(top, p) for i,p in enumerate(parts))


def render(path=ROOT/"nbs"/"index.ipynb"):
    "The text of README.md."
    exporter = MarkdownExporter()
    # plain text rather than a data frame's HTML: GitHub drops the style sheet and shows its rules as text
    exporter.register_filter("filter_data_type", lambda out: [t for t in ("text/markdown", "text/plain") if t in out][:1])
    text, _ = exporter.from_notebook_node(prepare(nbformat.read(path, as_version=4)))
    text = re.sub(r"\n{3,}", "\n\n", relink(text)).strip()
    return NOTE + "\n".join(line.rstrip() for line in text.split("\n")) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Render nbs/index.ipynb as README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md differs")
    check, readme = parser.parse_args().check, ROOT/"README.md"
    text = render()
    if not check: readme.write_text(text, encoding="utf-8")
    elif readme.read_text(encoding="utf-8")!=text: sys.exit("README.md differs from nbs/index.ipynb: run python .ci/readme.py")


if __name__=="__main__": main()
