"The pages are the source: library and README say what they say, and the pages themselves are clean."
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT/"nbs").rglob("[!._]*.ipynb"))
HAND_WRITTEN = ["__init__.py", "__main__.py", "_torchvision.py"]
TOP = {"nbs", "draft_nb", "app.py", "tests", "settings.ini", "setup.py", "README.md", "constraints.txt", "LICENSE"}
FOREIGN_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home|tmp|private|Users|opt|usr|mnt|var)/[\w.-]+")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the pages beside a library that was just exported from them; the pages are cleaned afterwards."
    top = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT/"nbs", top/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT/"settings.ini", top)
    (top/"draft_nb").mkdir()
    for name in HAND_WRITTEN: shutil.copy(ROOT/"draft_nb"/name, top/"draft_nb")
    env = {k:v for k,v in os.environ.items() if k!="IN_TEST"} | {"XDG_CONFIG_HOME": str(top/".config")}
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).with_name(command)], cwd=top, env=env, capture_output=True, text=True)
        assert done.returncode==0, f"{command} failed\n{done.stdout}{done.stderr}"
    return top


@pytest.fixture(scope="module")
def readme():
    "The module .ci/readme.py."
    spec = importlib.util.spec_from_file_location("readme", ROOT/".ci"/"readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(folder): return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py")}


def test_library_is_exported(copy):
    "`nbdev_export` changes nothing, and no module is left over from a page that is gone."
    ours, fresh = modules(ROOT/"draft_nb"), modules(copy/"draft_nb")
    assert sorted(ours)==sorted(fresh)
    assert [name for name in ours if ours[name]!=fresh[name]]==[], "run nbdev_export"


def test_readme_is_rendered(readme):
    assert (ROOT/"README.md").read_text()==readme.render(), "run python .ci/readme.py"


def test_readme_links(readme):
    "What the README points to is in the repository."
    text = "".join(readme._fence.split((ROOT/"README.md").read_text())[::2])
    links = [m[2].partition("#")[0] for m in readme._link.finditer(text)]
    assert [link for link in links if not (ROOT/link).exists()]==[]


def test_relink(readme):
    "Links are moved from nbs/ to the top; other addresses and code stay."
    assert readme.relink("![a](images/a.png) [b](../LICENSE)")=="![a](nbs/images/a.png) [b](LICENSE)"
    assert readme.relink('<img src="images/a.png">')=='<img src="nbs/images/a.png">'
    for same in ("[a](https://a.b/c)", "[a](#b)", "`[a](b)`", "```\n[a](b)\n```"): assert readme.relink(same)==same


@each_page
def test_page_is_clean(page, copy):
    unchanged = page.read_text()==(copy/page.relative_to(ROOT)).read_text()
    assert unchanged, "run nbdev_clean"


@each_page
def test_page_is_small(page):
    assert page.stat().st_size<=300_000


@each_page
def test_outputs(page):
    "No error was saved, nothing that went to stderr, and no path of the machine on which the page was run."
    outputs = [o for c in json.loads(page.read_text())["cells"] for o in c.get("outputs", [])]
    assert [o for o in outputs if o["output_type"]=="error" or o.get("name")=="stderr"]==[]
    texts = [t for o in outputs for k,t in {"text": o.get("text", ""), **o.get("data", {})}.items() if k.startswith("text")]
    found = [m[0] for t in texts for m in FOREIGN_PATH.finditer("".join(t))]
    assert found==[]


def test_top_level():
    "At the top lies what the design names, and dotfiles."
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode: pytest.skip("not a git checkout")
    assert {name for name in {Path(line).parts[0] for line in git.stdout.splitlines()} if name[0]!="."}==TOP
