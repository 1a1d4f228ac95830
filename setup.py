"""What pyproject.toml cannot say: two source roots, and two files for site-packages.

The two files make ``nnUNetv2_train -tr MSTKDTrainer`` work right after ``pip install``: Python runs them at start, and
they call ``nnunetv2_mstkd.nnunet.registration.autoload``. Python 3.15 and later read the ``.start`` file (PEP 829) and
skip the ``import`` line of a ``.pth`` file of the same name; earlier ones know the ``.pth`` file only.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

STARTUP_FILES = {
    "nnunetv2_mstkd.pth": "import nnunetv2_mstkd.nnunet.registration; nnunetv2_mstkd.nnunet.registration.autoload()\n",
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


setup(
    packages=[
        *find_packages(include=["nnunetv2_mstkd", "nnunetv2_mstkd.*"]),
        "nnunetv2_mstkd.nnunet._trainer_path",  # no package, so that nnU-Net finds nothing in it but its one module
        "nnunetv2_mstkd.dataset_conversion",
    ],
    package_dir={
        "nnunetv2_mstkd": "nnunetv2_mstkd",
        "nnunetv2_mstkd.dataset_conversion": "dataset_conversion",
    },
    package_data={
        "nnunetv2_mstkd": ["py.typed"],
        "nnunetv2_mstkd.reporting": ["templates/*"],
        "nnunetv2_mstkd.dataset_conversion": ["protocols/*.csv"],
    },
    cmdclass={"build_py": BuildWithStartupFiles},
)
