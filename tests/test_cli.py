"""The command line: its verbs and options, its output, its exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import trainer
from trainer import cli, console, tools

Run = Callable[..., "Result"]
MNIST = "configs/mnist.toml"


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process, in an empty folder that has the shipped configs."""
    (tmp_path / "configs").symlink_to(Path(cli.__file__).parent.parent / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_DATA_FILES", raising=False)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return Result(int(exit_.value.code or 0), out, err)

    return call


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['trainer', '--help']\n"
        "from trainer.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'pydantic', 'matplotlib', 'sklearn'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout


def test_the_versions_are_printed_at_once() -> None:
    code = (
        "import sys; sys.argv = ['trainer', '--version']\n"
        "from trainer.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: sys.exit({'keras', 'pydantic'} & {*sys.modules} or e.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras"))
    assert done.stdout.startswith(f"trainer {trainer.__version__} ({versions}, Python 3.")


@pytest.mark.usefixtures("in_tmp_path")
def test_a_shipped_configuration_works_in_every_folder(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    shipped, default = Path(cli.__file__).parent.parent / "configs", console.DEFAULT_CONFIG
    code, out, err = command("config", "show", "--json")
    assert (code, json.loads(out)["training"]["deterministic"]) == (0, False)
    assert err == f"trainer: there is no {default} here; reading {shipped / default.name}\n"
    code, out, _ = command("config", "list")
    names = [line.split()[0] for line in out.splitlines()]
    assert (code, names) == (0, sorted(f"configs/{path.name}" for path in shipped.glob("*.toml")))
    assert "configs/mnist_tiny.toml" in command("config", "show", "configs/mnits_tiny.toml")[2]
    # A file of the user is preferred.
    Path("configs").mkdir()
    default.write_text("data.name = 'mine'\n")
    code, out, err = command("config", "show", "--json")
    assert (code, json.loads(out)["data"]["name"], err) == (0, "mine", "")


def test_a_shell_completes_verbs_options_runs_and_configurations(tmp_path: Path) -> None:
    for name in ("runs/20260101T000000Z-first", "others/20260101T000000Z-second"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.toml").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.toml").touch()

    code = "import sys; sys.argv[0] = 'trainer'\nfrom trainer.cli import main; main()"

    def completed(line: str) -> list[str]:
        """Returns what bash receives when the cursor is at the end of a line."""
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **words, "_TRAINER_COMPLETE": "complete_bash"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert completed("trainer ev") == ["evaluate"]
    assert completed("trainer fit --dr") == ["--dry-run"]
    assert completed("trainer fit configs/m")[:2] == ["configs/mine.toml", "configs/mnist.toml"]
    assert completed("trainer fit own/") == []  # the shell completes a file
    assert completed("trainer evaluate ") == ["20260101T000000Z-first", "first", "latest"]
    assert completed("trainer fit --resume fir") == ["first"]
    assert completed("trainer evaluate --runs others s") == ["second"]


def test_help_groups_the_verbs_and_each_has_an_example_that_works() -> None:
    program: Any = typer.main.get_command(cli.app)
    for command in program.commands.values():
        assert command.rich_help_panel in ("Train", "Inspect", "Keep", "Measure"), command.name
        for verb in getattr(command, "commands", {"": command}).values():
            start, *words = shlex.split(verb.epilog or "no example")
            assert (start, words[0]) == ("Example:", "trainer"), verb.name
            words = words[: words.index(">")] if ">" in words else words
            found = program
            for word in words[1:3]:
                found = getattr(found, "commands", {}).get(word, found)
            assert found is verb
            verb.make_context(verb.name, words[2 if verb is command else 3 :])  # or a UsageError


def test_the_verbs_and_options_are_frozen() -> None:
    """A change can break the scripts of users: add it to CHANGELOG.md."""
    found = {}

    def walk(command: typer.core.TyperGroup, path: str) -> None:
        for name, sub in sorted(command.commands.items()):
            if hasattr(sub, "commands"):
                walk(sub, f"{path}{name} ")
            else:
                names = [p.opts[0] if p.opts[0].startswith("-") else p.name for p in sub.params]
                found[f"{path}{name}"] = " ".join(names)

    command: Any = typer.main.get_command(cli.app)
    walk(command, "")
    frozen = {
        "benchmark formats": "run --quick --compare --tolerance --runs --json",
        "benchmark matmul": "--device --shape --dtype --largest --textbook --quick --compare "
        "--tolerance --seed --runs --json",
        "benchmark step": "config --device --batch-size --precision --jit-compile --set --quick "
        "--compare --tolerance --runs --json",
        "benchmark operations": "--device --quick --compare --tolerance --seed --runs --json",
        "config list": "",
        "config schema": "",
        "config show": "config --set --json",
        "data info": "config --set --json",
        "data prepare": "config --set --overwrite --json",
        "doctor": "config --set --json",
        "evaluate": "run --split --device --trust --runs --json",
        "export": "run --format --name --directory --runs --json",
        "fit": "config --resume --device --set --epochs --name --dry-run --deterministic "
        "--profile --json",
        "gradient": "expression --at --wrt --order --model --runs --json",
        "load": "path --evaluate --trust --json",
        "predict": "run images --invert --device --trust --runs --csv --json",
        "save": "run path --overwrite --runs --json",
        "serve": "name --directory --host --port --max-body-bytes --trust",
        "tensorboard": "--runs --port",
        "tune": "config --name --set --trials --workers --refit --json",
        "verify": "path --trust --json",
    }
    # The tests of `new` and `runs` freeze theirs. Tools that were deleted have no verbs.
    found = {verb: names for verb, names in found.items() if verb.split()[0] not in ("new", "runs")}
    assert found == {verb: frozen[verb] for verb in frozen if verb.split()[0] in command.commands}


def test_fit_evaluate_and_predict_agree(run: Run, tmp_path: Path) -> None:
    fitted = run("fit", "configs/debug.toml", "--json", "--name", "story")
    assert fitted.code == 0, fitted.err
    summary = fitted.json
    assert "epoch 2/2" in fitted.err
    folder = tmp_path / summary["run"]
    assert folder.name.endswith("-story")
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert names == {
        *("README.md", "checkpoints", "classes.json", "config.toml", "environment.json"),
        *("log.txt", "metrics.jsonl", "predictions.npz", "summary.json", ".lock"),
        *("train", "validation", "test"),
    }
    seconds = summary["seconds"]
    assert {"import", "data", "tracing", "training", "evaluation", "total"} <= seconds.keys()
    assert summary["step_ms"] > 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert f"accuracy {summary['test']['accuracy']:.4f}" in (folder / "README.md").read_text()
    assert "epoch 2/2" in (folder / "log.txt").read_text()
    with np.load(folder / "predictions.npz") as saved:
        assert {key: str(saved[key].dtype) for key in saved} == {
            "labels": "int32",
            "predicted": "int32",
            "probability": "float32",
        }
        hits = saved["labels"] == saved["predicted"]
        assert hits.mean() == pytest.approx(summary["test"]["accuracy"])
        assert (saved["probability"] > 1 / summary["data"]["test"]).all()

    for reference in ("latest", folder.name, str(folder)):
        again = run("evaluate", reference, "--json")
        assert again.code == 0, again.err
        assert again.json["accuracy"] == summary["test"]["accuracy"]
        assert again.json["loss"] == summary["test"]["loss"]
        assert again.json["images"] == summary["data"]["test"] == 200
    again = run("evaluate", "latest", "--split", "validation", "--json")
    assert again.json["images"] == summary["data"]["validation"]
    assert again.json["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-6)

    pixels = np.random.default_rng(0).integers(0, 255, (3, 28, 28, 1), np.uint8)
    np.save("three.npy", pixels)
    Image.fromarray(pixels[0, :, :, 0]).save("one.png")
    predicted = run("predict", "latest", "one.png", "three.npy", "--json")
    assert predicted.code == 0, predicted.err
    first, *_ = results = predicted.json
    assert [r["image"] for r in results] == ["one.png", *(f"three.npy[{i}]" for i in range(3))]
    assert first["class"] == f"pattern {first['label']}"
    assert first["probability"] == max(first["probabilities"].values())
    assert first["probabilities"] == pytest.approx(results[1]["probabilities"])


def test_damaged_weights_are_refused(run: Run) -> None:
    folder = Path(run("fit", "configs/debug.toml", "--epochs", "1", "--json").json["run"])
    weights = folder / "checkpoints" / "final.weights.h5"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    np.save("one.npy", np.zeros((28, 28, 1), np.uint8))
    verbs: list[tuple[object, ...]] = [("evaluate", "latest"), ("predict", "latest", "one.npy")]
    if "saving" in tools.names():
        verbs.append(("load", folder))
    for arguments in verbs:
        result = run(*map(str, arguments))
        assert result.code == 2
        assert f"{weights} is damaged: expected sha256" in result.err
    weights.unlink()
    assert "found no file" in run("evaluate", "latest").err


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("fit", "configs/debug.toml", "--dry-run")
    assert (result.code, sorted(p.name for p in tmp_path.iterdir())) == (0, before)
    assert "dry run" in result.out


def test_flags_override_the_file_and_the_result_is_printed(run: Run) -> None:
    result = run(
        *("fit", "configs/debug.toml", "--set", "training.epochs=2", "--epochs", "1"),
        *("--set", "training.seed=3", "--set", "logging.tensorboard=false"),
    )
    assert result.code == 0, result.err
    for printed in ("test accuracy", "training ", "ms per step", "saved in runs/"):
        assert printed in result.out
    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["epochs"], summary["seed"]) == (1, 3)
    assert not (folder / "train").exists()


def test_config_show_is_complete_and_config_schema_is_json(run: Run) -> None:
    Path("shown.toml").write_text(run("config", "show", "configs/debug.toml").out)
    shown = run("config", "show", "configs/debug.toml", "--json").json
    assert shown["model"]["name"] == "mlp"
    assert shown["origins"]["model.name"] == "configs/debug.toml"
    again = run("config", "show", "shown.toml", "--json").json
    assert again | {"origins": shown["origins"]} == shown
    assert "clip_norm" in json.dumps(run("config", "schema").json)


def test_a_closed_pipe_ends_a_verb_as_the_signal_would() -> None:
    """As in `trainer config schema | head -c 1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trainer", "config", "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_data_info_counts_the_classes(run: Run) -> None:
    info = run("data", "info", "configs/debug.toml", "--json").json
    assert info["name"] == "synthetic"
    assert sum(info["class_counts"]["train"].values()) == info["train"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["fit", "configs/nothing.toml"], 2, "did you mean 'configs/"),
        (["fit", "--set", "training.epoch=1"], 2, "did you mean 'epochs'"),
        (["fit", "--set", "training.epochs=0"], 2, "training.epochs"),
        (["fit", "--set", "training.epochs='x'"], 2, "training.epochs"),
        (["fit", "broken.toml"], 2, "broken.toml cannot be read as TOML"),
        (["fit", "--set", "data.name=mnst"], 2, "did you mean 'mnist'"),
        (["fit", "configs/debug.toml", "--set", "model.name=mpl"], 2, "did you mean 'mlp'"),
        (["fit", "configs/debug.toml", "--set", "optimizer.name=Adan"], 2, "did you mean 'Adam'"),
        (
            [
                *("fit", "configs/debug.toml", "--set", "model.name=layers", "--set"),
                "model.options.units=[8]",
            ],
            2,
            "model.options",
        ),
        (
            [
                *("fit", "configs/debug.toml", "--set", "model.name=layers", "--set"),
                'model.options={layers=[{name="Conv2"}]}',
            ],
            2,
            "did you mean 'Conv2D'",
        ),
        (["fit", "configs/debug.toml", "--set", "training.batch_size=5000"], 2, "5000"),
        (
            ["fit", "configs/debug.toml", "--set", "training.loss.name=MeanSquaredError"],
            2,
            "training.loss or training.metrics does not fit",
        ),
        (
            [
                *("fit", "configs/debug.toml", "--set"),
                "training.loss={name='SparseCategoricalCrossentropy',options={reduction='none'}}",
            ],
            2,
            "expected one number for a batch",
        ),
        (
            [
                *("fit", "configs/debug.toml", "--set"),
                'training.callbacks=[{name="EarlyStopping",options={monitor="val_los"}}]',
            ],
            2,
            "monitor = 'val_los': did you mean 'val_loss'",
        ),
        (
            [
                *("fit", "configs/debug.toml", "--set", "optimizer.schedule.name=CosineDecay"),
                *("--set", 'training.callbacks=[{name="ReduceLROnPlateau"}]'),
            ],
            2,
            "sets the learning rate",
        ),
        (
            ["fit", "configs/debug.toml", "--set", "optimizer.options.learning_rate=0.1"],
            2,
            "use optimizer.learning_rate instead",
        ),
        *(
            (
                ["fit", "configs/debug.toml", "--set", f"training.callbacks=[{callback}]"],
                2,
                f"callback {said}",
            )
            for callback, said in (
                ("{name='EarlyStopping',options={monitor=3}}", "'EarlyStopping': monitor = 3"),
                ("{name='ModelCheckpoint',options={filepath=3}}", "'ModelCheckpoint'"),
                ("{name='BackupAndRestore',options={backup_dir='a'}}", "'BackupAndRestore' del"),
                ("{name='SwapEMAWeights'}", "'SwapEMAWeights' is not needed"),
            )
        ),
        (
            [
                *("fit", "configs/debug.toml", "--set", "model.name=layers", "--set"),
                'model.options.layers=["StringLookup"]',
            ],
            2,
            "the model cannot be run on images of the data: ",
        ),
        (
            [
                *("fit", "configs/debug.toml", "--set", "model.name=layers", "--set"),
                'model.options.layers=[{name="Flatten",x=1}]',
            ],
            2,
            "layers.0: unknown key 'x': available: name, options",
        ),
        (["fit", "--set", "data.name='..'"], 2, "data set '..' cannot be opened"),
        (["fit", "configs/debug.toml", "--set", "logging.directory=a_file"], 2, "a_file"),
        (["fit", "configs/debug.toml", "--device", "gpu:x"], 2, "training.device"),
        (["evaluate", "nothing"], 2, "there is no run in runs"),
        (["evaluate", "unfinished", "--runs", "others"], 2, "not finished"),
        (["predict", "latest", "a_file"], 2, "there is no run"),
        (["tensorboard", "--runs", "nothing"], 2, "nothing"),
        (["data", "info", MNIST, "--set", "data.archives=no"], 2, "there is no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    Path("broken.toml").write_text("[training\n")
    Path("a_file").write_text("no folder")
    Path("others/unfinished").mkdir(parents=True)
    Path("others/unfinished/config.toml").write_text("")
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)
    lines = [line for line in result.err.splitlines() if line.startswith("trainer: ")]
    assert (result.code, len(lines)) == (code, 1), result.err
    assert said in lines[0]
    assert "Traceback" not in result.err
    assert result.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_gpu_is_refused_on_a_machine_without_one(run: Run, tmp_path: Path) -> None:
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    result = run("fit", "configs/debug.toml", "--device", "gpu")
    assert result.code == 3
    assert "expected a GPU, found none" in result.err
    assert "tensorflow[and-cuda]" in result.err
    assert not (tmp_path / "runs").exists()


def test_a_loss_of_nan_ends_the_run_and_names_the_step(run: Run) -> None:
    result = run(
        *("fit", "configs/debug.toml", "--set", "optimizer.name=SGD"),
        *("--set", "optimizer.learning_rate=1e30"),
    )
    assert result.code == 4, result.err
    assert "at step " in result.err
    assert "lower optimizer.learning_rate" in result.err
    assert run("evaluate", "latest").code == 2  # the run exists, and is not finished


def test_a_stopped_training_has_its_own_exit_code(tmp_path: Path) -> None:
    """Stops a process between two epochs. test_resume.py has SIGINT."""
    config = Path(cli.__file__).parent.parent / "configs" / "debug.toml"
    command = [sys.executable, "-m", "trainer", "fit", str(config), "--epochs", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("epoch 2/"):
            process.terminate()
            break
    said += process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 143, said
    assert any(line.startswith("trainer: stopped") for line in said), said
    assert not any("Traceback" in line for line in said), said
    (run,) = (tmp_path / "runs").iterdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines][:2] == [1, 2]
    assert not (run / "summary.json").exists()
    assert not list(run.rglob(".partial-*"))


def test_a_training_continues_without_a_reader(tmp_path: Path) -> None:
    """The reader of stderr ends after a line; stdin and stdout are closed."""
    config = Path(cli.__file__).parent.parent / "configs" / "debug.toml"
    fit = f"{sys.executable} -m trainer fit {config} --epochs 1 <&- >&- 2> >(head -1)"
    subprocess.run(["bash", "-c", fit], cwd=tmp_path, check=True, capture_output=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["epochs"] == 1
    assert "Traceback" not in (run / "log.txt").read_text()


def test_an_error_of_the_system_is_one_line(run: Run) -> None:
    result = run("evaluate", "a" * 300)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "File name too long" in result.err


def test_json_output_never_contains_nan(run: Run) -> None:
    """The only step breaks the network, but its own loss is still finite."""
    result = run(
        *("fit", "configs/debug.toml", "--epochs", "1", "--set", "training.limit_batches=1"),
        *("--set", "optimizer.learning_rate=1e30", "--json"),
    )
    assert (result.code, result.out) == (4, "")
    assert "the loss became" in result.err
    dry = run("fit", "configs/debug.toml", "--dry-run", "--set", "optimizer.learning_rate=1e30")
    assert (dry.code, dry.out) == (4, "")


@pytest.mark.parametrize("device", ["tpu", "", "gpu:-1", "gpufoo", "GPU"])
@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_every_verb_checks_the_device(run: Run, verb: str, device: str) -> None:
    result = run(verb, "latest", *["x.png"] * (verb == "predict"), "--device", device)
    assert result.code == 2
    assert f"received {device!r}" in result.err


def test_a_reserved_name_is_refused_for_a_metric(run: Run) -> None:
    metric = '[{name="SparseCategoricalAccuracy",options={name="loss"}}]'
    result = run("fit", "configs/debug.toml", "--set", f"training.metrics={metric}")
    assert result.code == 2
    assert "loss is reserved" in result.err
