"""`trainer new`: a project of the user's own, with its checks and tests; and what it refuses."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import typer
from test_structure import ROOT, Checkout

import trainer
from trainer import cli, data, tools
from trainer.errors import InputError
from trainer.new import project
from trainer.new.configuration import default_config
from trainer.new.names import check_name, rename
from trainer.new.removal import Removal, check_removable

ALL = sorted(set(tools.names()) - {"new"})
# The longer name makes lines longer, and imports come in another order.
VARIANTS = {"birds": [], "bird_species_lab": ALL}


@pytest.fixture(autouse=True)
def author(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An author for git, and a working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    for variable in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
        monkeypatch.setenv(variable, "A")
    for variable in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(variable, "a@example.org")


def git(folder: str, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_the_images_of_the_user_are_not_copied() -> None:
    names = {*project._read_files(Path(), None)}
    left = project._read_files(Path(), project.ROOT / "saved_models")
    assert names - left.keys() == {"saved_models/README.md"}


def test_its_options_are_frozen() -> None:
    command: Any = typer.main.get_command(cli.app)
    names = [parameter.opts[0] for parameter in command.commands["new"].params]
    assert names == ["directory", "--name", "--without", "--data"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_project_has_its_own_name(name: str, command: Callable[..., Any]) -> None:
    without = ",".join(VARIANTS[name])
    code, out, err = command("new", "own", "--name", name, "--without", without)
    assert (code, err) == (0, "")
    assert out == f"created own: run `make fit` there; settings: configs/{name}.toml\n"
    assert [path.name for path in Path().iterdir()] == ["own"]
    assert git("own", "status", "--short") == ""
    assert git("own", "log", "--format=%an %s") == f"A {name}, created with trainer new 0.1.0\n"

    files = {file: Path("own", file) for file in git("own", "ls-files").splitlines()}
    texts = {file: path.read_text(encoding="utf-8") for file, path in files.items()}
    assert not [file for file in files if file.startswith(("runs/", "data/", "scripts/research"))]
    assert Path("own", ".ci", "run").stat().st_mode & 0o100
    everything = "\n".join([*files, *texts.values()])
    assert set(re.findall(r"[\w.]*trainer\w*", everything, re.I)) == {"keras.src.trainers"}
    assert texts["README.md"].startswith(f"# {name}\n")
    assert f"{name.upper()}_DATA_FILES" in texts[f"{name}/config.py"]
    assert f'Path("configs/{name}.toml")' in texts[f"{name}/console.py"]
    assert not re.search(rf"\(?\b({'|'.join(['new', *VARIANTS[name]])})\)", texts["pyproject.toml"])


@pytest.mark.parametrize("tool", ALL)
def test_the_parts_of_a_tool_are_removed(tool: str) -> None:
    files = project._read_files(Path(), None)
    removal = Removal([tool], files)
    assert {f"trainer/{tool}/cli.py", f"docs/{tool}.md", "docs/comparison.md"} <= removal.files
    kept = files.keys() - removal.files
    assert {"trainer/cli.py", "configs/mnist.toml", "scripts/kill_and_resume.py"} <= kept
    for file in kept:
        if file.endswith(".md") and file != "CHANGELOG.md":
            text = removal.edit(file, files[file])
            targets = re.findall(r"\]\((?!http)([^)#]+)", text)
            found = {(ROOT / file).parent.joinpath(target).resolve() for target in targets}
            assert not found & {ROOT / removed for removed in removal.files}, file
            assert not re.search(rf"^ *trainer {tool}\b", text, re.MULTILINE), file


def test_what_belongs_to_a_tool() -> None:
    files = project._read_files(Path(), None)
    assert {"configs/mnist_tune.toml", "scripts/kill_and_tune.py"} <= Removal(
        ["tuning"], files
    ).files
    removal = Removal(["saving", "serving"], files)
    assert {"scripts/load_test.py", "saved_models/README.md"} <= removal.files
    edited = removal.edit("pyproject.toml", files["pyproject.toml"])
    assert "(gradient) | (new) | (runs) | (tuning)" in edited
    for word in ("saving", "serving", "onnx", "starlette"):
        assert f"{word}>" not in edited
        assert f"({word})" not in edited
    text = "One.\nTwo: `trainer serve`.\nThree.\n\n- a\n- `trainer serve`,\n  twice\n- b\n"
    expected = "\nOne.\nThree.\n\n- a\n- b\n"
    assert removal.edit("docs/a.md", f"\n{text}") == expected


def test_only_the_package_is_renamed() -> None:
    text = "trainer.fit TRAINER_X TrainerError trainers '\\ntrainer' ../trainer trainer_log"
    expected = "my_net.fit MY_NET_X MyNetError trainers '\\nmy_net' ../my_net my_net_log"
    assert rename(text, "my_net") == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", "my-birds", "Birds", "1a", "birds_", "vögel"),
        *("class", "numpy", "pillow", "trainer", "tests", "dist", "model"),
    ],
)
def test_a_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"--name: expected .*, received '"):
        check_name(name, project._read_files(Path(), None))


WRONG = {
    "full --name a1": "DIRECTORY: expected a new or empty folder .*, received '.*/full'",
    "full/file --name a1": "DIRECTORY: expected a new or empty folder ",
    "no/folder --name a1": "DIRECTORY: expected a new or empty folder in an existing ",
    ". --name a1": "DIRECTORY: expected a new or empty folder ",
    f"{ROOT}/own --name a1": "DIRECTORY: .* not in the repository, received ",
    "own --name numpy": "--name: expected a name that no installed package has, received 'numpy'",
    "own --name a1 --without tunning": r"--without: .*'tunning': did you mean 'tuning'\? ",
    "own --name a1 --without new": "--without: .*available: ",
    "own --name a1 --without saving": "--without: expected also benchmark, which imports saving",
    "own --name a1 --data missing": "--data: expected a folder .*, received 'missing'",
    "own --name a1 --data missing.csv": "--data: expected a folder .*, received 'missing.csv'",
    "own --name a1 --data full": "--data: expected a folder with a subfolder .*, received 'full'",
    "own --name a1 --data full/file": "--data: expected a folder .*, received 'full/file'",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(
    words: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    Path("full").mkdir()
    Path("full", "file").touch()
    code, out, err = command("new", *words.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(f"trainer: {WRONG[words]}.*\n", err), err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]
    assert not (ROOT / "own").exists()


def test_what_is_missing_is_one_line(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert command("new", "own", "--name", "a1")[::2] == (
            2,
            "trainer: trainer new needs git: install it\n",
        )
    monkeypatch.setattr(project, "ROOT", tmp_path)  # as in a wheel
    code, _, err = command("new", "own", "--name", "a1")
    assert code == 2
    assert "trainer new copies its repository: clone it" in err
    assert not list(tmp_path.iterdir())


def test_without_an_author_nothing_is_committed(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AUTHOR_NAME", "COMMITTER_NAME", "AUTHOR_EMAIL", "COMMITTER_EMAIL"):
        monkeypatch.delenv(f"GIT_{variable}")
    code, out, err = command("new", "own", "--name", "birds")
    assert code == 0
    assert out.startswith("created own")
    assert re.fullmatch(r"not committed \(.*\): set git's user.name .*\n", err)
    assert "A  README.md" in git("own", "status", "--short")


def test_a_checkout_is_not_needed_and_an_interruption_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A copy without .git: the files that .gitignore does not exclude, with those of the user."""
    root = tmp_path / "root"
    for file, text in project._read_files(Path(), None).items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    (root / "data").mkdir()
    (root / "data" / "prepared").touch()
    picture = b"\x89PNG\0\xfftrainer"
    (root / "picture.png").write_bytes(picture)
    monkeypatch.setattr(project, "ROOT", root)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(project, "_commit", interrupt)
        project.create_project(Path("own"), "birds", [], None)
    assert list(tmp_path.iterdir()) == [root]
    Path("own").mkdir()
    project.create_project(Path("own"), "birds", [], None)
    assert Path("own", "birds", "cli.py").exists()
    assert Path("own", "picture.png").read_bytes() == picture
    assert not Path("own", "data").exists()


def test_tools_that_others_import_stay() -> None:
    check_removable(["saving", "serving", "benchmark"])
    for names in (["saving"], ["saving", "benchmark"]):
        with pytest.raises(InputError, match=r"expected also .*, which imports saving"):
            check_removable(names)


@pytest.mark.parametrize("kind", ["folder", "table", "arrays"])
def test_the_default_configuration_reads_the_data(kind: str, tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / 'a "trainer"', 10)
    table = pictures.write_table(tmp_path / "b", 10)
    lines = table.read_text(encoding="utf-8").replace("file,species", "path,label", 1)
    table.write_text(lines, encoding="utf-8")
    images, labels = pictures.arrays(10)
    np.savez("c.npz", images=images, labels=labels)
    paths = {"folder": 'a "trainer"', "table": str(table), "arrays": "c.npz"}
    text = default_config(ROOT / "configs", "birds", Path(paths[kind]), tmp_path / "own")
    Path("birds.toml").write_text(text, encoding="utf-8")
    config = trainer.load_config("birds.toml")
    assert config.data.name == kind
    written = paths[kind] if Path(paths[kind]).is_absolute() else f"../{paths[kind]}"
    assert config.data.options["path"] == written
    Path("own").mkdir()
    changed = config.with_changes({"data.options.path": str(tmp_path / "own" / written)})
    assert data.load(changed.data).spec.class_count == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_project_passes_its_checks_and_tests(name: str, tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "pictures", 30)
    project.create_project(Path("own"), name, VARIANTS[name], Path("pictures"))
    copy = Checkout(tmp_path / "own")
    metadata = copy.folder / f"{name}.egg-info"  # as an installation writes
    metadata.mkdir()
    (metadata / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    copy.make_check()
    copy.run(sys.executable, "-m", name, "fit", "--epochs", "1")
    shutil.rmtree(copy.folder / "runs")
    options = ["-q"] if VARIANTS[name] else ["-q", "--collect-only", "-n0"]
    copy.run(sys.executable, "-m", "pytest", *options)
    assert git("own", "status", "--short") == ""
