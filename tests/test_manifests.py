"""The manifests for SLURM and Kubernetes: sound by their validators, and doing what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from trainer.cluster import Cluster
from trainer.devices import read_cluster

FOLDER = Path(__file__).parent.parent / "scripts" / "cluster"
SLURM = FOLDER / "slurm.sh"
MANIFESTS = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
(JOB,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "Job"]
(CONTAINER,) = JOB["spec"]["template"]["spec"]["containers"]
SCRIPT = CONTAINER["command"][-1]

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(in_tmp_path: Path) -> Run:
    """Runs a command with a `trainer` that only notes its arguments and environment."""
    noted = in_tmp_path / "noted"
    stub = in_tmp_path / ".venv" / "bin" / "trainer"
    stub.parent.mkdir(parents=True)
    stub.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        f"with open({str(noted)!r}, 'a') as file:\n"
        "    noted = {'arguments': sys.argv[1:], 'variables': dict(os.environ)}\n"
        "    print(json.dumps(noted), file=file)\n"
    )
    # What SLURM does: the command as often as there are tasks, each with its number.
    (stub.parent / "srun").write_text(
        "#!/usr/bin/env bash\nshift\n"
        "export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST='n[1-2]'\n"
        "export SLURM_STEP_TASKS_PER_NODE='1(x2)'\n"
        'for i in 0 1; do SLURM_PROCID=$i "$@"; done\n'
    )
    for path in stub.parent.iterdir():
        path.chmod(0o755)

    def call(*command: str, **variables: str) -> list[dict[str, Any]]:
        path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
        noted.unlink(missing_ok=True)
        subprocess.run(command, env=os.environ | {"PATH": path} | variables, check=True)
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [json.loads(line) for line in lines]

    return call


def make_run(name: str, *files: str) -> None:
    folder = Path("runs") / f"20260101T000000Z-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[m["kind"] for m in MANIFESTS])
def test_kubernetes_takes_each_manifest(manifest: dict[str, Any]) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(manifest, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):  # it does look
        kubernetes_validate.validate(manifest | {"unknown": 1}, version, strict=True)


def test_shells_take_the_scripts(tmp_path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    inside = tmp_path / "kubernetes.sh"
    inside.write_text(f"#!/usr/bin/env bash\n{SCRIPT}")
    for script in (SLURM, inside):
        done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_kubernetes_starts_workers_that_know_each_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = JOB["spec"]["completions"]
    given = {each["name"]: each["value"] for each in CONTAINER["env"]}
    assert count == JOB["spec"]["parallelism"] == int(given["WORKERS"])
    port = CONTAINER["ports"][0]["containerPort"]
    hosts = [f"{JOB['metadata']['name']}-{i}.{MANIFESTS[0]['metadata']['name']}" for i in range(2)]
    for index in range(count):
        (noted,) = run("bash", "-c", SCRIPT, JOB_COMPLETION_INDEX=str(index), **given)
        monkeypatch.setenv("TF_CONFIG", noted["variables"]["TF_CONFIG"])
        expected = Cluster(tuple(f"{host}:{port}" for host in hosts), index)
        assert read_cluster() == expected
        assert noted["arguments"][:3] == ["fit", "--name", given["NAME"]]


def test_kubernetes_goes_on_and_ends(run: Run) -> None:
    given = {"WORKERS": "2", "NAME": "digits", "JOB_COMPLETION_INDEX": "1"}
    make_run("my-digits", "config.toml", "summary.json")  # another's
    (noted,) = run("bash", "-c", SCRIPT, **given)
    assert noted["arguments"][:3] == ["fit", "--name", "digits"]
    make_run("digits", "config.toml")
    (noted,) = run("bash", "-c", SCRIPT, **given)
    assert noted["arguments"][:3] == ["fit", "--resume", "digits"]
    make_run("digits", "summary.json")
    assert run("bash", "-c", SCRIPT, **given) == []


def test_slurm_starts_workers_and_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started = run(str(SLURM), "configs/debug.toml", NAME="mine")
    expected = ["fit", "configs/debug.toml", "--device", "all", "--name", "mine"]
    assert [noted["arguments"] for noted in started] == [expected, expected]
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for index, noted in enumerate(started):
        for name, value in noted["variables"].items():
            if name.startswith("SLURM_"):
                monkeypatch.setenv(name, value)
        assert read_cluster() == Cluster(("n1:8888", "n2:8888"), index)
    make_run("mine", "config.toml")
    started = run(str(SLURM), "configs/debug.toml", NAME="mine")
    assert [noted["arguments"] for noted in started] == [["fit", "--resume", "mine"]] * 2
    make_run("mine", "summary.json")
    assert run(str(SLURM), "configs/debug.toml", NAME="mine") == []
    (noted, _) = run(str(SLURM), "configs/mnist_tiny.toml")
    assert noted["arguments"][-2:] == ["--name", "mnist_tiny"]
