"""What pyproject.toml cannot say: two source roots, two files for site-packages, and links that work anywhere.

The two files make ``nnUNetv2_train -tr MSTKDTrainer`` work right after ``pip install``: Python runs them at start, and
they call ``nnunetv2_mstkd.nnunet.registration.autoload``. Python 3.15 and later read the ``.start`` file (PEP 829) and
skip the ``import`` line of a ``.pth`` file of the same name; earlier ones know the ``.pth`` file only.

A release sets ``MSTKD_REPOSITORY_URL``, the address of the public repository. The links and pictures of README.md are
then absolute in the package's metadata, as a package index needs them, and the project's addresses are listed.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

LEGACY = """try:
    from nnunetv2_mstkd.nnunet import registration
    registration.autoload()
except ModuleNotFoundError as error:
    if error.name != "nnunetv2_mstkd":
        raise
"""
STARTUP_FILES = {
    # silent where the package is away, such as an editable one whose checkout was moved
    "nnunetv2_mstkd.pth": f"import sys; exec({LEGACY!r})\n",
    "nnunetv2_mstkd.start": "nnunetv2_mstkd.nnunet.registration:autoload\n",
}


class BuildWithStartupFiles(build_py):
    """``build_py`` that puts the start-up files at the top of the wheel, which pip unpacks into site-packages."""

    def run(self) -> None:
        super().run()
        # An editable build throws build_lib away and packs install_lib, which holds the finder of the checkout.
        top = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(top)
        for name, content in STARTUP_FILES.items():
            Path(top, name).write_text(content, encoding="utf-8")


def readme(repository: str) -> str:
    """Return README.md, with its relative links made absolute if the address of the repository is given."""
    text = Path("README.md").read_text(encoding="utf-8")
    if not repository:
        return text
    init = Path("nnunetv2_mstkd/__init__.py").read_text(encoding="utf-8")
    tag = "v" + re.search(r'^__version__ = "(.+)"', init, re.MULTILINE)[1]
    text = re.sub(r'(src="|!\[[^]]*\]\()(?![a-z]+:)', rf"\1{repository}/raw/{tag}/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?![a-z]+:|#)", rf"\1{repository}/blob/{tag}/", text)


def project_urls(repository: str) -> dict[str, str]:
    """Return the project's addresses, none if that of the repository is not given."""
    pages = {"Source": "", "Issues": "/issues", "Changelog": "/blob/HEAD/CHANGELOG.md"}
    return {name: repository + page for name, page in pages.items()} if repository else {}


REPOSITORY = os.environ.get("MSTKD_REPOSITORY_URL", "").rstrip("/")

setup(
    long_description=readme(REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls=project_urls(REPOSITORY),
    packages=[
        *find_packages(include=["nnunetv2_mstkd", "nnunetv2_mstkd.*"]),
        "nnunetv2_mstkd.nnunet._trainer_path",  # no package, so that nnU-Net finds nothing in it but its one module
        "nnunetv2_mstkd.dataset_conversion",
    ],
    package_dir={
        "nnunetv2_mstkd": "nnunetv2_mstkd",
        "nnunetv2_mstkd.dataset_conversion": "dataset_conversion",
    },
    include_package_data=False,  # the wheel gets what is listed here; MANIFEST.in adds more to the source archive
    package_data={
        "nnunetv2_mstkd": ["py.typed"],
        "nnunetv2_mstkd.app": ["static/*"],
        "nnunetv2_mstkd.reporting": ["templates/*"],
        "nnunetv2_mstkd.dataset_conversion": ["protocols/*.csv"],
    },
    cmdclass={"build_py": BuildWithStartupFiles},
)
