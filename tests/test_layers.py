"""Who may import whom: the table of the design, held against the syntax trees of the library.

Decades are layers. A module may import any lower decade, and of its own what its row names. Another edge is a
decision: it is made here, where a reader sees it.
"""
import ast
import json
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    number: int      # of the notebook; its tens are the layer
    same: str        # modules of the same decade
    packages: str    # of others, besides the standard library
    never: str = ""  # modules of a lower decade that are handed in instead


LIGHT = "torch numpy PIL safetensors tqdm yaml"
ANY = f"{LIGHT} diffusers transformers tokenizers peft accelerate open_clip huggingface_hub pandas matplotlib gradio"

TABLE = {
    "anneal":      Row( 0, "", "torch"),
    "kl":          Row( 1, "", "torch"),
    "toy":         Row( 2, "", "torch"),
    "values":      Row( 4, "", ""),
    "sampler":     Row(10, "", LIGHT),
    "adapters":    Row(11, "", f"{LIGHT} peft"),
    "models":      Row(12, "adapters", f"{LIGHT} diffusers transformers huggingface_hub"),
    "pipelines":   Row(13, "adapters sampler", "torch diffusers"),
    "estimators":  Row(14, "", "torch"),
    "rewards":     Row(20, "", f"{LIGHT} open_clip transformers accelerate huggingface_hub"),
    "metrics":     Row(21, "rewards", "torch transformers safetensors"),
    "prompts":     Row(22, "", ""),
    "preferences": Row(23, "rewards prompts", f"{LIGHT} open_clip"),
    "train":       Row(30, "", f"{LIGHT} accelerate pandas diffusers filelock pydantic", never="models rewards"),
    "export":      Row(31, "train", f"{LIGHT} diffusers huggingface_hub peft"),
    "sweep":       Row(32, "train", f"{LIGHT} pandas"),
    "plots":       Row(40, "", f"{LIGHT} pandas matplotlib"),
    "demo":        Row(41, "plots", ANY),
    "cli":         Row(42, "plots demo", f"{ANY} tyro"),
    "tiny_data":   Row(50, "", f"{ANY} resvg_py"),
    "tiny_model":  Row(51, "tiny_data", ANY),
    "tiny_reward": Row(52, "tiny_data tiny_model", ANY),
    "bench":       Row(60, "", ANY),
}
# `draft-nb bench` starts what lies above the command line: the one edge that points up, inside its function
# figures are drawn by plots, which knows nothing of the package: a run or a sweep draws its curves and pictures when it saves them
UPWARD = {("cli", "bench"), ("train", "plots"), ("sweep", "plots")}
# installed by whoever wants them, imported inside the function that does
OPTIONAL = {"demo": {"spaces"}, "train": {"bitsandbytes"}, "metrics": {"efficientnet_lite_pytorch", "torchmetrics"}, "prompts": {"pyarrow"}, "preferences": {"pyarrow"}}
HAND_WRITTEN = {"_torchvision": Row(-1, "", "torch"), "__main__": Row(99, "cli", "")}


def allowed(module):
    row = TABLE[module]
    lower = {name for name,other in TABLE.items() if other.number//10 < row.number//10}
    return lower - set(row.never.split()) | set(row.same.split())


MODULES = sorted(p for p in (ROOT/"draft_nb").rglob("*.py") if p.stem not in ("__init__", "_modidx"))
PAGES = sorted((ROOT/"nbs").rglob("[!._]*.ipynb"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def imports(tree):
    "(module, name or None, whether inside a function) of each import; relative ones spelled out."
    def walk(node, inside):
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import): yield from ((a.name, None, inside) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(filter(None, ["draft_nb" if child.level else "", child.module]))
                yield from ((base, a.name, inside) for a in child.names)
            else: yield from walk(child, inside)
    yield from walk(tree, False)


def edges(tree):
    "(submodule of draft_nb, whether inside a function)"
    for module,name,inside in imports(tree):
        parts = module.split(".")
        if parts[0]!="draft_nb": continue
        if len(parts)>1: yield parts[1], inside
        elif name is not None and name!="__version__": yield name, inside


def packages(tree, inside=(True, False)):
    "Third-party packages, imported inside functions or outside or both."
    return {m.partition(".")[0] for m,_,i in imports(tree) if i in inside} - {"draft_nb"} - sys.stdlib_module_names


def parse(path): return ast.parse(path.read_text(), str(path))


def needed(path):
    "Third-party packages of a module, without those that are optional and imported late."
    tree = parse(path)
    return packages(tree, (False,)) | packages(tree, (True,)) - OPTIONAL.get(path.stem, set())


def calls(tree, name):
    "Calls of `name`, be it a bare name or the end of a dotted one."
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and re.fullmatch(rf"(.*\.)?{name}", ast.unparse(n.func))]


def iterates_over(tree, name):
    "Loops and comprehensions whose iterable mentions `name`."
    loops = [n.iter for n in ast.walk(tree) if isinstance(n, (ast.For, ast.AsyncFor, ast.comprehension))]
    return [i for i in loops for n in ast.walk(i)
            if (isinstance(n, ast.Name) and n.id==name) or (isinstance(n, ast.Attribute) and n.attr==name)]


def test_table_points_down():
    "A lower decade, or an earlier row of the same one: no cycles."
    numbers = [row.number for row in TABLE.values()]
    assert numbers==sorted(set(numbers))
    assert [(m, o) for m in TABLE for o in allowed(m) if TABLE[o].number>=TABLE[m].number]==[]


def test_pages_are_numbered_as_in_the_table():
    "NN_name.ipynb exports `name`; lessons export nothing."
    for page in PAGES:
        source = "\n".join("".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"]=="code")
        module = re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.M)
        if page.parent!=ROOT/"nbs" or page.stem=="index":
            assert not re.search(r"^#\|\s*(default_exp|exports?\b)", source, re.M), f"{page.name} exports"
            continue
        number, _, name = page.stem.partition("_")
        assert module==[name], f"{page.name} exports {module}"
        assert name in TABLE and int(number)==TABLE[name].number, f"{page.name} is not in the table"


@each_module
def test_module_is_in_the_table(path): assert path.stem in TABLE or path.stem in HAND_WRITTEN


@each_module
def test_edges(path):
    if path.stem in HAND_WRITTEN: assert {name for name,_ in edges(parse(path))} <= set(HAND_WRITTEN[path.stem].same.split())
    else:
        upward = {name for module,name in UPWARD if module==path.stem}
        assert {name for name,inside in edges(parse(path)) if not (inside and name in upward)} <= allowed(path.stem)


@each_module
def test_packages(path):
    "torch but never diffusers below the models, and no nbdev or fastcore at all: those are for working on the pages."
    assert needed(path) <= set((TABLE|HAND_WRITTEN)[path.stem].packages.split())


def test_requirements():
    "Whatever the library imports is in settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    def name(s): return re.match(r"[\w.-]+", s)[0].lower().replace("-", "_")
    required = {name(r) for r in config["DEFAULT"]["requirements"].split()}
    developing = required | {name(r) for r in config["DEFAULT"]["dev_requirements"].split()}
    owner = packages_distributions()
    for path in MODULES:
        tiny = path.stem.startswith("tiny_") # these pages remake the embedded model
        for package in needed(path):
            assert {name(d) for d in owner.get(package, [package])} & (developing if tiny else required), f"{path.stem}: {package}"


def test_cli_imports_late():
    "`draft-nb --help` must not wait for torch."
    path = ROOT/"draft_nb"/"cli.py"
    if not path.exists(): pytest.skip("no command line yet")
    early = {m.partition(".")[0] for m,_,inside in imports(parse(path)) if not inside}
    assert early <= sys.stdlib_module_names | {"draft_nb", "yaml"}


def test_one_denoising_loop():
    assert {p.stem for p in MODULES if iterates_over(parse(p), "timesteps")} <= {"sampler"}


@each_module
def test_no_print(path):
    if path.stem!="cli": assert not [n.lineno for n in calls(parse(path), "print")]


@each_module
def test_no_bare_except(path):
    assert not [n.lineno for n in ast.walk(parse(path)) if isinstance(n, ast.ExceptHandler) and n.type is None]


@each_module
def test_weights_are_never_unpickled(path):
    for call in calls(parse(path), r"torch\.load"):
        assert any(k.arg=="weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)
    assert not packages(parse(path)) & {"joblib", "dill", "cloudpickle"}
    assert not calls(parse(path), r"(pickle\.loads?|Unpickler)")
    assert "pickle" not in {m for m,name,_ in imports(parse(path)) if name} # `from pickle import load` would hide there


# the rules above find what they look for

def test_imports_finds_all_spellings():
    tree = ast.parse("""
import draft_nb.kl, os
from draft_nb import anneal
from . import toy
from .models import load
def f():
    if True:
        from draft_nb.bench import run
    class A:
        def g(self): import numpy as np
""")
    assert set(edges(tree))=={("kl", False), ("anneal", False), ("toy", False), ("models", False), ("bench", True)}
    assert packages(tree)=={"numpy"}


def test_loops_are_found():
    assert iterates_over(ast.parse("for i,t in enumerate(self.scheduler.timesteps): pass"), "timesteps")
    assert iterates_over(ast.parse("[t for t in timesteps]"), "timesteps")
    assert not iterates_over(ast.parse("T = len(scheduler.timesteps)\nfor i in range(T): pass"), "timesteps")


def test_calls_are_found():
    assert calls(ast.parse("torch.load(f)"), r"torch\.load") and calls(ast.parse("print(1)"), "print")
    assert calls(ast.parse("pickle.load(f)"), r"(pickle\.loads?|Unpickler)")
    assert not calls(ast.parse("fingerprint(1)"), "print")
