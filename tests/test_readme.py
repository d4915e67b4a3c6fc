"""The README is true: its commands run, its examples work, its links lead somewhere."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

import trainer
from trainer import cli, data, models
from trainer.data import mnist_sample
from trainer.data._prepared import write_prepared


@functools.cache
def sample() -> data.Source:
    """The MNIST sample, read once."""
    return _load_sample(trainer.Config().data)


_load_sample = mnist_sample.load
ROOT = Path(trainer.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def _commands() -> list[str]:
    lines = [line for block in _blocks("sh") for line in block.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's reader has: configs, examples, pictures, and some data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_DATA_FILES", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed network, on every machine
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    random = np.random.RandomState(0)
    for label in ("cats", "dogs"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(100):
            pixels = random.randint(0, 255, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    Image.fromarray(random.randint(0, 255, (28, 28), np.uint8)).save("digit.png")
    # Clothes cannot be had without a network: a few made-up ones stand where they would be.
    images, labels = random.randint(0, 255, (150, 28, 28, 1), np.uint8), np.arange(150) % 10
    split = (150, (28, 28, 1), [(images, labels)])
    write_prepared(
        tmp_path / "data" / "fashion_mnist",
        name="fashion_mnist",
        version="made-up",
        class_names=[str(i) for i in range(10)],
        origin="a test",
        splits={"train": split, "test": split},
    )
    for block in _blocks("python"):
        if path := re.match(r"# trainer/(data|models)/(\w+)\.py\n", block):
            folder = tmp_path / "own" / path[1]
            folder.mkdir(parents=True)
            (folder / f"{path[2]}.py").write_text(block)
    monkeypatch.setattr(mnist_sample, "load", lambda config: sample())  # noqa: ARG005
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "own" / "data")])
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "own" / "models")])
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(
    clone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tensorboard: Callable[[Path], str],
) -> None:
    """In the README's order, in one folder; MNIST is the sample, as without a network."""
    # TensorBoard wants a run to show, and `latest` one to name: `make fit` comes first there too.
    commands = ["trainer fit --epochs 1", *_commands()]
    ran = 0
    for command in commands:
        program, *arguments = command.split()
        if program != "trainer":
            assert program in ("make", ".")  # what `make` does, CI does before it runs this test
            continue
        ran += 1
        if arguments == ["tensorboard"]:
            assert tensorboard(clone).startswith("http://localhost:")
            continue
        if arguments[0] == "serve":  # up to where it would wait for requests
            monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # noqa: ARG005
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capfd.readouterr()
        expected = 3 if "gpu" in arguments else 0  # conftest leaves GPUs out
        assert (end.value.code or 0) == expected, f"{command}: {said.err}"
    assert ran == sum("trainer" in line.split()[0] for line in commands if line)
    assert ran > 12


def test_every_target_of_make_is_there() -> None:
    for command in _commands():
        if command.startswith("make "):
            subprocess.run(
                ["make", "--dry-run", *command.split()[1:]],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )


def test_every_configuration_builds_and_takes_a_step(clone: Path) -> None:
    """The TOML examples of the README, and every file of configs/ on data that is here."""
    for i, block in enumerate(_blocks("toml")):
        (clone / f"example-{i}.toml").write_text(block)
    shipped = sorted((clone / "configs").glob("*.toml"))
    known = {"mnist.toml", "mnist_mlp.toml", "fashion_mnist.toml", "debug.toml"}
    known |= {"mnist_best.toml", "mnist_tiny.toml", "mnist_tune.toml"}
    assert known <= {path.name for path in shipped}
    for path in [*sorted(clone.glob("example-*.toml")), *shipped]:
        config = trainer.load_config(path)
        if config.data.name == "mnist":
            config = config.with_changes({"data.name": "mnist_sample"})
        summary = trainer.fit(config, dry_run=True).summary
        assert summary["test"]["loss"] > 0, path
        assert summary["parameters"] < 10_000 or path.stem != "mnist_tiny"


ROWS = """
SAMPLE_OPTIONS = {"rows": 30}

def load(config, *, rows: int):
    import numpy as np
    from trainer.data import Source
    images = np.arange(rows * 4, dtype=np.uint8).reshape(rows, 2, 2, 1)
    return Source("rows", "1", ["even", "odd"], (images, np.arange(rows) % 2))
"""
WITHOUT_SAMPLES = """
def load(config, *, folder: str): ...
def build(spec, *, units: int): ...
"""
LARGE = """
import keras
from keras import layers
from trainer.models import class_probabilities, image_input

SAMPLE_OPTIONS = {"units": 3}
SAMPLE_IMAGE_SHAPE = (40, 40, 3)

def build(spec, *, units: int):
    images, x = image_input(spec)
    if spec.image_shape != (40, 40, 3):
        raise ValueError("expected large images")
    x = layers.AveragePooling2D(8)(x)
    x = layers.Dense(units)(layers.Flatten()(x))
    return keras.Model(images, class_probabilities(x, spec))
"""
BY_NAME = 'CONTRACT_TESTS_SKIPPED = "needs a scanner"\n'
OWN_MODULES = {
    "data/rows.py": ROWS,
    "data/required.py": WITHOUT_SAMPLES,
    "data/scanner.py": BY_NAME,
    "models/large.py": LARGE,
    "models/large_only.py": LARGE.replace("SAMPLE_IMAGE_SHAPE", "_SHAPE"),
    "models/required.py": WITHOUT_SAMPLES,
    "models/scanner.py": BY_NAME,
}


def copy_repository(folder: Path) -> None:
    """Copies every file that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository: no list of its files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


@pytest.mark.slow
def test_modules_of_a_reader_pass_the_contract_tests(tmp_path: Path) -> None:
    """The README's modules, and others, in a copy of the repository."""
    copy_repository(tmp_path)
    for block in _blocks("python"):
        if path := re.match(r"# (trainer/\w+/\w+\.py)\n", block):
            (tmp_path / path[1]).write_text(block)
    for name, text in OWN_MODULES.items():
        (tmp_path / "trainer" / name).write_text(text)

    def run(*arguments: str) -> str:
        end = subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-v", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert end.returncode == 0, end.stdout
        return end.stdout

    output = run("tests/test_data.py", "tests/test_models.py", "tests/test_gradient.py")
    for passed in (
        "keeps_the_contract[rows]",
        "refuses_an_option_it_does_not_know[my_pictures]",
        "raw_images_in_probabilities_out[my_network-28x28x1-10-float32]",
        "raw_images_in_probabilities_out[large-8x9x3-4-float32]",
        "equal_seeds_make_equal_networks[large]",
        "gradients_of_every_network_are_right[my_network]",
        "gradients_of_every_network_are_right[large]",
    ):
        assert re.search(rf"{re.escape(passed)} PASSED", output), passed
    for skipped, reason in (
        ("keeps_the_contract[my_pictures]", "No such file or directory: 'pictures'"),
        ("keeps_the_contract[required]", "SAMPLE_OPTIONS is missing"),
        ("refuses_an_option_it_does_not_know[scanner]", "needs a scanner"),
        ("equal_seeds_make_equal_networks[required]", "SAMPLE_OPTIONS is missing"),
        ("equal_seeds_make_equal_networks[large_only]", "SAMPLE_IMAGE_SHAPE is missing"),
        ("gradients_of_every_network_are_right[scanner]", "needs a scanner"),
    ):
        assert re.search(rf"{re.escape(skipped)} SKIPPED", output), skipped
        assert reason in " ".join(output.split())

    random = np.random.RandomState(0)
    for label in ("cats", "dogs"):
        folder = tmp_path / "pictures" / label
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = random.randint(0, 255, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    assert "keeps_the_contract[my_pictures] PASSED" in run("tests/test_data.py", "-k=my_pictures")


@pytest.mark.usefixtures("clone")
def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(block for block in _blocks("python") if "trainer.fit" in block)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["probabilities"].shape == (3, 10)
    assert "runs/" in capsys.readouterr().out


def test_every_link_leads_to_a_file() -> None:
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (ROOT / target).exists(), target


def test_contributing_counts_the_lines_of_the_examples() -> None:
    counted = re.findall(
        r"\((\d+) lines in the README's example\)", (ROOT / "CONTRIBUTING.md").read_text()
    )
    examples = [block for block in _blocks("python") if block.startswith("# trainer/")]
    lines = [
        len(
            [
                line
                for line in block.splitlines()
                if line.strip() and not line.startswith(("#", '"""'))
            ]
        )
        for block in examples
    ]
    assert [int(number) for number in counted] == lines
    assert max(lines) <= 40
