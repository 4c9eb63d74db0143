"""Installs the lowest allowed version of every direct dependency and tries the package with it.

    python .ci/lowest.py                   makes an environment, installs, runs the smoke test, removes the environment
    python .ci/lowest.py --keep FOLDER     the same in FOLDER, which stays
    python .ci/lowest.py --pytest FILE...  these tests, too
"""
import argparse
import configparser
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
