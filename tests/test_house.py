"""The house itself: whose rooms these are, how they are laid out, and the install traps that stay closed."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).parent.parent
ROOMS = ("pipelines", "ops", "models", "infra")
LOCK = dict(
    line.split("==") for line in (REPO / "requirements.lock").read_text().splitlines() if not line.startswith("#")
)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_ours(room: str) -> None:
    found = Path(importlib.import_module(room).__file__ or "")
    assert REPO in found.parents, f"{room} is taken by another distribution: {found}"


def test_every_test_file_mirrors_a_file_of_a_room() -> None:
    for test in (REPO / "tests").glob("*/test_*.py"):
        if test.parent.name in ROOMS:
            assert (REPO / test.parent.name / test.name.removeprefix("test_")).exists(), test


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "base", "misc", "types", "constants"}
    assert not [p for room in ROOMS for p in (REPO / room).glob("**/*.py") if p.stem in vague]


def test_every_locked_package_is_installed_in_its_version() -> None:
    for name, version in LOCK.items():
        assert importlib.metadata.version(name).split("+")[0] == version, name


def test_the_lock_satisfies_what_pyproject_asks() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in LOCK.items()}
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        version = names[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), line


def test_the_back_port_of_dataclasses_is_not_installed() -> None:
    """It shadows the standard library in Prefect's server, which then dies."""
    assert "dataclasses" not in LOCK
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("dataclasses")


def test_the_only_broken_requirement_is_that_back_port() -> None:
    command = [Path(sys.executable).with_name("uv"), "pip", "check", "--python", sys.executable]
    told = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stderr
    complaints = [line for line in told.splitlines() if "requires" in line]
    assert len(complaints) == 1, told
    assert "img2dataset" in complaints[0]
    assert "dataclasses" in complaints[0]


def test_torch_is_a_cpu_build_or_has_its_gpu() -> None:
    import torch

    assert torch.version.cuda is None or torch.cuda.is_available()


def test_boto3_and_s3fs_do_not_fight() -> None:
    """s3fs would bring an older botocore that boto3 can't use."""
    assert not {"s3fs", "aiobotocore", "prefect-ray"} & LOCK.keys()


def test_only_the_bucket_imports_boto3_and_only_the_cluster_starts_ray() -> None:
    for room in ROOMS:
        for path in (REPO / room).glob("**/*.py"):
            text = path.read_text()
            if path != REPO / "infra/bucket.py":
                assert not re.search(r"^\s*(import|from) (boto3|botocore)", text, re.MULTILINE), path
            if path != REPO / "infra/cluster.py":
                assert "ray.init(" not in text, path


def test_no_module_does_heavy_work_at_import() -> None:
    """`--help` answers in a blink: the command line's module pulls in none of these."""
    heavy = ("torch", "ray", "prefect", "pyarrow", "cv2")
    code = f"import sys, pipelines.cli; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"
