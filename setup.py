"Everything that pip needs is in settings.ini; this file hands it over."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist as _sdist

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class sdist(_sdist):
    "A source archive carries settings.ini too: without it, this file cannot run there."
    def make_distribution(self):
        self.filelist.append("settings.ini")
        super().make_distribution()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["draft_nb", "draft_nb.*"]),
    package_data={"draft_nb": ["assets/**/*"]},
    python_requires=f">={cfg['min_python']}",
    classifiers=["Programming Language :: Python :: 3", *(f"Programming Language :: Python :: {v}" for v in cfg["pythons"].split())], # pytest ran on these
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    cmdclass={"sdist": sdist},
)
