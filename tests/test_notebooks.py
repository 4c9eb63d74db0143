"Every page runs from its first to its last cell, each in a process of its own, by nbdev's own runner."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p.relative_to(ROOT/"nbs").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb")
               if not any(part[0] in "._" for part in p.relative_to(ROOT/"nbs").parts))

RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
passed, seconds = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not passed)
"""


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, str(ROOT/"nbs"/page)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=900)
    if done.returncode: pytest.fail(f"nbs/{page}\n{done.stdout}{done.stderr}", pytrace=False)
