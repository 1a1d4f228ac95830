"""What is not set, not installed or does not answer is said in one line, with what to do."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.crossval import cluster, locks
from nnunetv2_mstkd.nnunet.folders import nnunet_folder
from nnunetv2_mstkd.processes import command_path


def test_a_variable_of_nnunet_that_is_not_set_is_named(monkeypatch, capsys):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    assert cli.main(["crossval", "-d", "901", "-c", "3d_fullres", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nnUNet_preprocessed is not set; nnU-Net needs it too: export nnUNet_preprocessed=FOLDER" in error


def test_a_variable_that_names_no_folder_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"nnUNet_raw is .*nowhere, which is not a folder; create it, or set another"
    ):
        nnunet_folder("nnUNet_raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert nnunet_folder("nnUNet_raw") == tmp_path


def test_a_command_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nnUNetv2_train is not installed; pip install nnunetv2"):
        command_path("nnUNetv2_train")
    (tmp_path / "nnUNetv2_train").touch()
    assert command_path("nnUNetv2_train") == str(tmp_path / "nnUNetv2_train")


def test_a_machine_without_slurm_or_submitit_submits_nothing(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="there is no command sbatch on this machine"):
        cluster.check_cluster()
    monkeypatch.setattr(cluster.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setitem(sys.modules, "submitit", None)  # its import fails
    with pytest.raises(ImportError, match=r"needs submitit: pip install 'nnunetv2_mstkd\[cluster\]'"):
        cluster.check_cluster()


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ((0, "RUNNING\n", ""), "RUNNING"),
        ((0, "COMPLETED\n", ""), None),
        ((0, "", ""), None),
        ((1, "", "slurm_load_jobs error: Invalid job id specified"), None),
        ((1, "", "Unable to contact slurm controller"), "state not known: squeue does not answer"),
        (subprocess.TimeoutExpired("squeue", 60), "state not known: squeue does not answer"),
        (FileNotFoundError("squeue"), "state not known: squeue does not answer"),
    ],
)
def test_a_slurm_that_does_not_answer_still_has_the_job(monkeypatch, answer, state):
    def run(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), answer, strict=True)))

    monkeypatch.setattr(locks.subprocess, "run", run)
    assert locks.job_state("7") == state
