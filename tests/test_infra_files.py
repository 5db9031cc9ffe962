"""The files of a cluster, without one: what is written is what the code says, and nothing that KubeRay doesn't know."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra.cluster import CLIENT_PORT, GCS_PORT, JOB_PORT, QUIET
from ops.train_job import JOB_ENVIRONMENT, entrypoint, from_json, job_name
from pipelines.settings import resolve
from tests.test_house import LOCK, REPO, ROOMS

CRDS = json.loads((REPO / "tests/kuberay-1.7.0.json").read_text())
FILES = {
    name: yaml.safe_load((REPO / f"infra/kubernetes/{name.lower()}.yaml").read_text())
    for name in ("RayCluster", "RayJob")
}
DOCKERFILE = REPO / "infra/docker/Dockerfile"


def _closed(schema: Any) -> Any:
    """A structural schema as Kubernetes means it, but what is not known is refused instead of dropped."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(each) for name, each in schema.items()}
    if closed.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "type" in schema and not schema.get("additionalProperties"):
        closed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return closed


def _check(kind: str, content: Any) -> None:
    schema = _closed(CRDS[kind])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator(schema).validate(content)


@pytest.mark.parametrize("kind", FILES)
def test_kuberay_takes_the_file(kind: str) -> None:
    _check(kind, FILES[kind])
    assert FILES[kind]["kind"] == kind
    assert FILES[kind]["apiVersion"] == "ray.io/v1"


@pytest.mark.parametrize(
    ("kind", "was", "now"),
    [
        ("RayJob", "entrypoint:", "entrypiont:"),
        ("RayJob", "clusterSelector: {", "clusterSelector: { a: 1,"),
        ("RayCluster", "mode: token", "mode: tokens"),
        ("RayCluster", "containerPort:", "containerport:"),
        ("RayCluster", "replicas: 4", "replicas: four"),
        ("RayCluster", "secretRef:", "secretref:"),
    ],
)
def test_a_slip_of_the_pen_is_refused(kind: str, was: str, now: str) -> None:
    text = (REPO / f"infra/kubernetes/{kind.lower()}.yaml").read_text()
    assert was in text
    with pytest.raises(jsonschema.ValidationError):
        _check(kind, yaml.safe_load(text.replace(was, now)))


def _groups() -> list[dict[str, Any]]:
    spec = FILES["RayCluster"]["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_the_cluster_is_of_our_ray_and_listens_where_the_code_looks() -> None:
    spec = FILES["RayCluster"]["spec"]
    assert spec["rayVersion"] == LOCK["ray"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports == {"gcs-server": GCS_PORT, "client": CLIENT_PORT, "dashboard": JOB_PORT}
    for group in _groups():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"] == ("armchair:cuda" if has_gpu else "armchair:cpu")
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert f"USER {pod['securityContext']['runAsUser']}" in DOCKERFILE.read_text()


def test_the_job_is_what_the_launcher_would_submit_and_fits_the_cluster() -> None:
    spec = FILES["RayJob"]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": FILES["RayCluster"]["metadata"]["name"]}
    *_, text = shlex.split(spec["entrypoint"])
    job, place = from_json(text)
    s = resolve("gpu")
    meant = replace(job, model=s.transformer, training=s.transformer_training, sampling=s.sampling)
    assert spec["entrypoint"] == entrypoint(meant, place)
    assert spec["jobId"] == job_name(job, 1)
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": JOB_ENVIRONMENT}
    gpus = sum(
        group.get("replicas", 1)
        * group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        for group in _groups()
    )
    assert place.gpu
    assert place.workers <= gpus


@pytest.mark.cluster
def test_the_command_of_a_job_can_be_run(tmp_path: Path) -> None:
    """As far as its first word about a source that is none."""
    job = {"kind": "tokenizer", "source": str(tmp_path / "nothing"), "into": str(tmp_path / "into")}
    python, *rest = shlex.split(entrypoint(*from_json(json.dumps(job))))
    assert python == "python"
    ended = subprocess.run([sys.executable, *rest], cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "armchair-result" in ended.stdout


# The image ------------------------------------------------------------------------------------------------------------


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile: comments gone, lines that go on put together."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]  # type: ignore[misc]


INSTRUCTIONS = _instructions()


def _of(name: str) -> list[str]:
    return [arguments for instruction, arguments in INSTRUCTIONS if instruction == name]


def test_the_image_has_the_python_of_the_makefile() -> None:
    (base,) = _of("FROM")
    (python,) = re.findall(r"^PYTHON \?= python([\d.]+)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert base.startswith(f"python:{python}-slim")


def test_the_image_installs_what_make_setup_installs() -> None:
    makefile = (REPO / "Makefile").read_text().replace("$$", "$").replace("$(BIN)", "/opt/venv/bin")
    recipe = makefile.partition(".venv/installed: ")[2].partition("\ncheck:")[0]
    run = "\n".join(_of("RUN"))
    pinned = re.compile(r"\$\(grep -o '\^(\w+)==\[\^ \]\*' requirements\.lock\)")
    assert set(pinned.findall(run)) == set(pinned.findall(recipe)) == {"uv", "torch", "setuptools"}
    ours = re.findall(r"uv pip install (.*?)(?=\n|&&|$)", run)
    theirs = re.findall(r"uv pip install (.*?)(?=\n|&&|$)", recipe)
    assert [line.replace("--no-cache ", "").split() for line in ours] == [line.split() for line in theirs]
    assert not re.search(r"https?://", DOCKERFILE.read_text()), "whose packages they are is asked for, not written here"


def test_what_the_image_copies_is_here_is_let_through_and_is_all_that_is_run() -> None:
    sources = [word for line in _of("COPY") for word in line.split()[1:-1]]
    assert all(line.startswith("--chown=armchair ") for line in _of("COPY"))
    assert all((REPO / source).exists() for source in sources)
    assert set(ROOMS) < set(sources)
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)


def test_the_image_is_quiet_as_workers_are_and_runs_as_nobody_special() -> None:
    environment = dict(word.split("=", 1) for line in _of("ENV") for word in shlex.split(line))
    assert {name: value for name, value in environment.items() if name not in ("PATH",) and "NVIDIA" not in name} == {
        name: value for name, value in QUIET.items() if "metrics" not in name
    }  # which gauges are among
    assert _of("ENTRYPOINT") == ['["armchair"]']
    names = [instruction for instruction, _ in INSTRUCTIONS]
    (user,) = _of("USER")
    assert user != "0"
    assert names.index("USER") < names.index("COPY"), "and nothing is made as root after that"
