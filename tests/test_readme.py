"""The documents are correct: commands run, examples work, links and tables are complete."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import applications
import numpy as np
import pictures
import pytest
import typer
from PIL import Image

import trainer
from trainer import cli, console, data, models, tools
from trainer.data import mnist_sample
from trainer.data._prepared import write_prepared


@functools.cache
def sample() -> data.Source:
    """The MNIST sample, read once."""
    return _load_sample(trainer.Config().data)


_load_sample = mnist_sample.load
ROOT = Path(trainer.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The README's table of tools: the folder of each, and its verbs.
TOOLS = {
    name: re.findall(r"`(\w+)`", verbs)
    for name, verbs in re.findall(r"^\| \[\w+\]\(trainer/(\w+)\) \| (.+?) \|", README, re.MULTILINE)
}
# Tools whose folder was deleted. Their verbs, their pages and links to them are skipped.
REMOVED = {name for name in TOOLS if not (ROOT / "trainer" / name / "cli.py").exists()}
REMOVED_VERBS = {verb for name in REMOVED for verb in TOOLS[name]}
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")))
    if path.stem not in REMOVED
}
# A block that the tests cannot run has a comment with the reason before it.
NOT_RUN = re.compile(r"^<!-- not run: ([^\n]+) -->\n```\w+\n(.*?)^```", re.DOTALL | re.MULTILINE)
REASONS = {
    f"{page}: {block.splitlines()[0]}": reason
    for page, text in PAGES.items()
    for reason, block in NOT_RUN.findall(text)
}
RUN = {page: NOT_RUN.sub("", text) for page, text in PAGES.items()}


def _blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _commands(text: str) -> list[list[str]]:
    """Returns the commands of a page, without those of removed tools."""
    lines = [line for block in _blocks("sh", text) for line in block.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    return [words for words in commands if words[0] != "trainer" or words[1] not in REMOVED_VERBS]


def _belongs_to_removed_tool(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return len(parts) > 1 and Path(parts[1]).stem in REMOVED


def write_pictures(folder: Path, count: int) -> None:
    """Writes `count` random pictures of each of two classes."""
    random = np.random.RandomState(0)
    for label in ("cats", "dogs"):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = random.randint(0, 255, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader: configurations, the modules of the examples, pictures, some data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_DATA_FILES", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no network, on every machine
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs" / "mnist.toml", console.DEFAULT_CONFIG)
    random = np.random.RandomState(0)
    write_pictures(tmp_path / "pictures", 100)
    Image.fromarray(random.randint(0, 255, (28, 28), np.uint8)).save("digit.png")
    shutil.copy(pictures.write_table(tmp_path / "birds", 80), "birds/birds.csv")
    shapes, labels = pictures.arrays(80)
    np.savez("images.npz", images=shapes, labels=labels)
    # Fashion-MNIST would be downloaded: random images replace it.
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
    (tmp_path / "own.toml").write_text((ROOT / "configs" / "debug.toml").read_text())
    for text in PAGES.values():
        for block in _blocks("python", text):
            if path := re.match(r"# (?:trainer/)?((?:data/|models/)?\w+\.py)\n", block):
                file = tmp_path / ("own" if "/" in path[1] else ".") / path[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block)
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
    """In the order of the pages, in one folder; MNIST is the sample, as without a network."""
    # Otherwise Keras would download this file.
    weights = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_96_no_top.h5"
    downloads = Path(os.environ["KERAS_HOME"], "models")
    downloads.mkdir(exist_ok=True)
    applications.write_no_top(downloads / weights)
    # `make fit` comes first in the README: TensorBoard needs a run, and `latest` refers to one.
    commands = [["trainer", "fit", "--epochs", "1"]]
    for text in RUN.values():
        commands += [words for words in _commands(text) if words[0] in ("trainer", "python")]
    assert len(commands) > 12
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)  # noqa: ARG005
    for command in commands:
        program, *arguments = command
        if program == "python":
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
            continue
        if arguments == ["tensorboard"]:
            assert tensorboard(clone).startswith("http://localhost:")
            continue
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capfd.readouterr()
        expected = 3 if "gpu" in arguments else 0  # conftest hides GPUs
        assert (end.value.code or 0) == expected, f"{command}: {printed.err}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page: str) -> None:
    """Also those that would take too long: verbs, options, targets of make, and scripts."""
    for program, *arguments in _commands(PAGES[page]):
        if program == "make":
            done = subprocess.run(
                ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), arguments
        elif program == "trainer":
            command: Any = typer.main.get_command(cli.app)
            # `trainer runs` also works without another verb.
            while hasattr(command, "commands") and arguments and arguments[0][0] != "-":
                verb, *arguments = arguments
                assert verb in command.commands, f"unknown verb {verb!r}"
                command = command.commands[verb]
            command.make_context(verb, arguments)  # raises for an unknown option
        else:
            assert program in (".", "pip"), program


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_is_not_run_has_a_reason(page: str) -> None:
    """`make`, `pip` and the activation install what the tests run with."""
    programs = {words[0] for words in _commands(RUN[page])}
    assert programs <= {"trainer", "python", "make", "pip", "."}


@pytest.mark.parametrize("block", REASONS)
def test_blocks_that_are_not_run(block: str) -> None:
    """Lists them, so that they are not forgotten."""
    pytest.skip(REASONS[block])


PROGRAMS = {
    f"{page}-{i}": block
    for page, text in RUN.items()
    if page != "README.md"  # see test_the_python_example_runs
    for i, block in enumerate(_blocks("python", text))
    if not block.startswith("# ")  # a module that a command of the page uses
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_python_program_runs(clone: Path, name: str) -> None:
    """In its own process: some choose devices before TensorFlow is used."""
    end = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert end.returncode == 0, end.stderr


def test_an_unknown_verb_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAGES, "page", "```sh\ntrainer fly\n```\n")
    with pytest.raises(AssertionError, match="unknown verb 'fly'"):
        test_every_command_exists("page")


def test_the_table_of_tools_is_complete() -> None:
    assert set(tools.names()) == TOOLS.keys() - REMOVED
    core = {"fit", "evaluate", "predict", "tensorboard", "data", "config"}
    command: Any = typer.main.get_command(cli.app)
    verbs = {verb for name in TOOLS.keys() - REMOVED for verb in TOOLS[name]}
    assert command.commands.keys() == core | verbs


def test_the_structure_in_contributing_is_complete() -> None:
    found = {path.name for path in (ROOT / "trainer").glob("*.py") if path.stem[0] != "_"}
    found |= {path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py")}
    structure = set(re.findall(r"[\w.]+", _blocks("text", PAGES["CONTRIBUTING.md"])[0]))
    assert found <= structure, found - structure


@pytest.mark.slow
def test_every_configuration_builds_and_takes_a_step(clone: Path) -> None:
    """The TOML examples of the pages, and every file of configs/ with data that is available."""
    blocks = [block for text in PAGES.values() for block in _blocks("toml", text)]
    for i, block in enumerate(dict.fromkeys(blocks)):  # some are on two pages
        (clone / f"example-{i}.toml").write_text(block)
    shipped = sorted((clone / "configs").glob("*.toml"))
    known = {"mnist.toml", "mnist_mlp.toml", "fashion_mnist.toml", "debug.toml"}
    known |= {"mnist_best.toml", "mnist_tiny.toml"}
    assert known <= {path.name for path in shipped}
    for path in [*sorted(clone.glob("example-*.toml")), *shipped]:
        if tomllib.loads(path.read_text()).keys() & REMOVED or path.stem == "transfer":
            continue  # it configures a removed tool, or takes long: tests/test_transfer.py
        config = trainer.load_config(path)
        if not Path(config.data.options.get("path", ".")).resolve().is_relative_to(clone):
            continue  # images of the user, which would be decoded here
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


# From each contract test to the reason why it is skipped; None: it passes.
CONTRACT_RESULTS = {
    "fulfils_the_contract[rows]": None,
    "refuses_an_option_it_does_not_know[my_pictures]": None,
    "raw_images_in_probabilities_out[my_network-28x28x1-10-float32]": None,
    "raw_images_in_probabilities_out[large-8x9x3-4-float32]": None,
    "equal_seeds_make_equal_networks[large]": None,
    "fulfils_the_contract[my_pictures]": "No such file or directory: 'pictures'",
    "fulfils_the_contract[required]": "SAMPLE_OPTIONS is missing",
    "refuses_an_option_it_does_not_know[scanner]": "needs a scanner",
    "equal_seeds_make_equal_networks[required]": "SAMPLE_OPTIONS is missing",
    "equal_seeds_make_equal_networks[large_only]": "SAMPLE_IMAGE_SHAPE is missing",
}
GRADIENT_RESULTS = {
    "gradients_of_every_network_are_right[my_network]": None,
    "gradients_of_every_network_are_right[large]": None,
    "gradients_of_every_network_are_right[scanner]": "needs a scanner",
}


@pytest.mark.slow
def test_modules_of_a_reader_pass_the_contract_tests(tmp_path: Path) -> None:
    """The modules of the pages, and others, in a copy of the repository."""
    copy_repository(tmp_path)
    for block in (block for text in PAGES.values() for block in _blocks("python", text)):
        if path := re.match(r"# (trainer/\w+/\w+\.py)\n", block):
            (tmp_path / path[1]).write_text(block)
    for name, text in OWN_MODULES.items():
        (tmp_path / "trainer" / name).write_text(text)

    def run(*arguments: str) -> str:
        end = subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-v", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert end.returncode == 0, end.stdout
        return end.stdout

    files, expected = ["tests/data/test_data.py", "tests/models/test_models.py"], CONTRACT_RESULTS
    if "gradient" not in REMOVED:
        files.append("tests/gradient/test_gradient_network.py")
        expected = expected | GRADIENT_RESULTS
    output = run(*files)
    for test, reason in expected.items():
        status = "SKIPPED" if reason else "PASSED"
        assert re.search(rf"{re.escape(test)} {status}", output), test
        assert (reason or "") in " ".join(output.split())

    write_pictures(tmp_path / "pictures", 20)
    assert "fulfils_the_contract[my_pictures] PASSED" in run(files[0], "-k=my_pictures")


@pytest.mark.usefixtures("clone")
def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(block for block in _blocks("python", README) if "trainer.fit" in block)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["probabilities"].shape == (3, 10)
    assert "runs/" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_path_leads_to_a_file(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    folder = (ROOT / page).parent
    targets = []
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        target = (folder / link).resolve() if link else ROOT / page
        targets.append(target)
        content = target.read_text(encoding="utf-8") if anchor and target.exists() else ""
        if content and "<!-- generated: " not in content:  # `make docs` checks generated headings
            headings = re.findall(r"^#+ (.+)", content, re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
            assert anchor in slugs, f"{link}#{anchor}"
    if page != "CHANGELOG.md":  # it also names files of earlier versions
        paths = r"`(?:python )?((?:configs|docs|scripts|tests|trainer)/[\w./-]+)[` ]"
        targets += [ROOT / path for path in re.findall(paths, text)]
    for target in targets:
        assert target.exists() or _belongs_to_removed_tool(target), target


def test_contributing_counts_the_lines_of_the_examples() -> None:
    counted = re.findall(
        r"\((\d+) lines in the example of (docs/\w+\.md)\)", PAGES["CONTRIBUTING.md"]
    )
    examples = [
        block
        for _, page in counted
        for block in _blocks("python", PAGES[page])
        if block.startswith("# trainer/")
    ]
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
    assert [int(number) for number, _ in counted] == lines
    assert max(lines) <= 40
