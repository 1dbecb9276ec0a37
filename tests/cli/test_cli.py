"""The command line as a user meets it: results, exit codes, one sentence for every wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import Run
from report_experiments import Study, write_explanations
from small_disks import small_disk
from tiny import SETTINGS

from maehpc.recipes import load_recipe, recipe_yaml
from maehpc.shipped import shipped_folder


@pytest.mark.slow
def test_a_pipeline_ends_with_its_table_and_its_files(run: Run, tiny: str) -> None:
    outcome = run("run", "pipeline", "--recipe", tiny, "-q")
    assert outcome.code == 0, outcome.err
    for word in ("Saliency", "GradCAM", "DeepLIFT", "±", "results/tiny/report/index.html"):
        assert word in outcome.out
    figures = [line for line in outcome.out.splitlines() if line.endswith(".png")]
    assert any("panels" in line for line in figures)
    assert all(Path(line).is_file() for line in figures)

    again = run("aggregate", "results", "--json")
    rows = json.loads(again.out)["rows"]
    assert [row["method"] for row in rows] == ["saliency", "gradcam", "deeplift"]
    assert all(0 <= row["accuracy"] <= 1 and row["images"] == 20 for row in rows)
    assert run("verify", "results").out.endswith("0 problems\n")

    victim = next(Path("results/tiny/maps/digits.zarr/saliency").glob("c.1*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    broken = run("verify", "results", "--json")
    assert broken.code == 1
    (problem,) = json.loads(broken.out)["problems"]
    assert (problem["kind"], problem["shard"], Path(problem["path"])) == ("truncated", 1, victim)
    assert "1 of 3 shards" in run("aggregate", "results").out
    assert "digits.zarr: 1 of its shards forgotten; run explain" in run("verify", "results", "--repair").out
    assert run("run", "explain", "--name", "tiny").code == 0
    assert run("verify", "results").code == 0


def test_stages_one_by_one_share_an_experiment(run: Run, tiny: str) -> None:
    assert run("run", "pretrain", "--recipe", tiny, "--name", "study").code == 0
    assert run("run", "finetune", "--name", "study", "--set", "optim.lr=0.003").code == 0
    outcome = run("run", "explain", "--name", "study", "--methods", "saliency,deeplift", "--json", "-q")
    assert json.loads(outcome.out)["digits"]["images"] == 20
    recipe = yaml.safe_load(Path("results/study/recipe.yaml").read_text())
    assert recipe["finetune"]["optim"]["lr"] == 0.003
    assert recipe["explain"]["methods"] == ["saliency", "deeplift"]
    refused = run("run", "finetune", "--name", "study", "--set", "optim.lr=0.004")
    assert refused.code == 2
    assert "finetune.optim.lr was 0.003 and is 0.004" in refused.err


def write_npz(path: Path, **changes: object) -> Path:
    generator = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = generator.integers(0, 256, (12, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(12) % 3)[:, None].astype(np.uint8)
    arrays.update(changes)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_a_users_own_npz(run: Run, tiny: str, tmp_path: Path) -> None:
    own = write_npz(tmp_path / "Own Data.npz")
    outcome = run("run", "pipeline", "--recipe", tiny, "--datasets", str(own), "--set", "explain.images=null", "-q")
    assert outcome.code == 0, outcome.err
    assert Path("results/tiny/maps/own-data.zarr/zarr.json").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "finetune.epoch=3"], ["finetune.epoch"]),
        (["--set", "finetune.epochs=three"], ["finetune.epochs", "'three'"]),
        (["--set", "data.image_size=9"], ["data.image_size 9", "patch size 2"]),
        (["--datasets", "nosuchset"], ["nosuchset", "digits"]),
        (["--datasets", "absent.npz"], ["absent.npz"]),
        (["--datasets", "pathmnist"], ["pathmnist.npz", ".medmnist"]),
        (["--datasets", "digits,digits"], ["datasets", "once"]),
        (["--recipe", "absent.yaml"], ["absent.yaml"]),
        (["--recipe", "pipeline/absent"], ["pipeline/absent", "pipeline/report"]),
        (["--cluster", "absent"], ["absent", "debug"]),
        (["--methods", "voodoo"], ["explain.methods", "voodoo", "saliency"]),
        (["--name", "../elsewhere"], ["--name", "--results"]),
        (["--name", "report"], ["--name report"]),
        (["--name", "n" * 300], ["--name"]),
        (["--name", ""], ["--name is empty"]),
        (["--name", " "], ["--name is empty"]),
        (["--name", "two\nlines"], ["--name 'two\\nlines'"]),
        (["--set", "seed=2020-13-45"], ["seed", "YAML"]),
        (["--set", "encoder.weights=~nobody-of-this-name/x.pth"], ["~nobody"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--device", "cuda"], ["cuda"]),
        (["--nosuchoption"], ["--nosuchoption"]),
        (["--set", "encoder.weights=absent.pth"], ["encoder.weights", "absent.pth"]),
        (["--set", "encoder.name=timm:resnet18", "--set", "encoder.patch_size=null"], ["encoder"]),
        (["--set", "explain.gradcam.layer=blocks.7.norm1", "--set", "encoder.weights=scratch"], ["blocks.7"]),
    ],
)
def test_wrong_input_is_one_sentence_exit_2_and_nothing_written(
    words: list[str], expected: list[str], run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.font_manager
    import torch

    assert matplotlib.font_manager.fontManager.ttflist  # makes its cache of fonts now, and not in the folder below
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so asking for it is right")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    recipe = [] if "--recipe" in words else ["--recipe", tiny]
    outcome = run("run", "pipeline", *recipe, *words, "-q")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("maehpc: ")
    for word in expected:
        assert word in outcome.err
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("tiny.yaml",)]
    assert [path for path in left if path.suffix not in (".h5",)] == []


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize(
    ("stage", "datasets", "expected"),
    [
        ("explain", "nosuch.npz", "nosuch.npz does not exist; give the path of an .npz file"),
        ("explain", "digits,no/such", "no/such does not exist; give a folder"),
        ("explain", "nosuchset", "there is no data set 'nosuchset'"),
        ("finetune", "nosuch.npz", "nosuch.npz does not exist; give the path of an .npz file"),
        ("explain", "digits", "results/study/finetune/digits holds no finished finetune"),
    ],
)
def test_data_that_are_not_there_are_told_before_a_stage_that_is_not_done(
    stage: str, datasets: str, expected: str, command: str, run: Run, tiny: str, tmp_path: Path
) -> None:
    experiment = tmp_path / "results" / "study"
    experiment.mkdir(parents=True)
    (experiment / "recipe.yaml").write_bytes(Path(tiny).read_bytes())
    outcome = run(command, stage, "--name", "study", "--datasets", datasets, "-q")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert expected in outcome.err
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"tiny.yaml", "recipe.yaml"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"test_labels": None}, "test_labels"),
        ({"train_images": np.zeros((12, 8, 8), np.float32)}, "train_images"),
        ({"val_images": np.zeros((11, 8, 8), np.uint8)}, "val"),
        ({"train_labels": np.array([{}] * 12, dtype=object)}, "train_labels"),
    ],
)
def test_wrong_npz_files_are_told(
    change: dict[str, object], expected: str, run: Run, tiny: str, tmp_path: Path
) -> None:
    path = write_npz(tmp_path / "own.npz", **change)
    outcome = run("run", "pipeline", "--recipe", tiny, "--datasets", str(path), "-q")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert expected in outcome.err
    assert path.name in outcome.err
    assert not list((tmp_path / "results").rglob("*.h5"))


def test_a_truncated_npz_is_told(run: Run, tiny: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "own.npz")
    path.write_bytes(path.read_bytes()[:500])
    outcome = run("run", "pipeline", "--recipe", tiny, "--datasets", str(path), "-q")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "own.npz" in outcome.err


@pytest.mark.slow
def test_a_full_disk_is_exit_1_and_a_rerun_completes(run: Run, tiny: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as mount:
        results = str(mount("size=400k") / "results")
        outcome = run("run", "pipeline", "--recipe", tiny, "--results", results, "-q")
        assert (outcome.code, outcome.err.count("\n")) == (1, 1), outcome.err
        assert "full" in outcome.err
        mount("size=40m")
        assert run("run", "pipeline", "--recipe", tiny, "--results", results, "-q").code == 0
        assert run("verify", results).code == 0


def test_read_only_results_fail_before_computing(run: Run, tiny: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as mount:
        disk = mount("ro")
        outcome = run("run", "pipeline", "--recipe", tiny, "--results", str(disk / "results"), "-q")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1), outcome.err
    assert "read-only" in outcome.err


@pytest.mark.slow
def test_a_second_run_of_another_recipe_changes_nothing(run: Run, tiny: str, tmp_path: Path) -> None:
    words = ["run", "pipeline", "--recipe", tiny, "--set", "pretrain.epochs=60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "maehpc", *words, "-q"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "results/tiny/pretrain/digits/metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        recipe = (tmp_path / "results/tiny/recipe.yaml").read_bytes()
        refused = run(*words, "--set", "finetune.epochs=9", "-q")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "in use by a run of another recipe" in refused.err
        busy = run(*words, "-q")
        assert busy.code == 2
        assert "is being written by process" in busy.err
        assert (tmp_path / "results/tiny/recipe.yaml").read_bytes() == recipe
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_multi_label_data_end_to_end(run: Run, tiny: str, tmp_path: Path) -> None:
    many = {
        f"{split}_labels": (np.arange(36).reshape(12, 3) % 4 == 0).astype(np.uint8)
        for split in ("train", "val", "test")
    }
    path = write_npz(tmp_path / "many.npz", **many)
    words = ["run", "pipeline", "--recipe", tiny, "--datasets", str(path), "-q"]
    refused = run(*words, "--set", "explain.target=label")
    assert refused.code == 2
    assert "explain.target" in refused.err
    assert not (tmp_path / "results/tiny").exists()
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"][0]["images"] == 12


def test_data_that_may_be_left_out(run: Run, tiny: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "here.npz")
    words = ["run", "pretrain", "--recipe", tiny, "--datasets", f"{path}?,absent.npz?"]
    outcome = run(*words, "--set", "pretrain.batch_size=4")
    assert outcome.code == 0, outcome.err
    assert "left out: absent.npz" in outcome.err
    assert Path("results/tiny/pretrain/here/done.json").is_file()


def test_a_later_run_uses_as_many_threads_as_the_first(run: Run, tiny: str) -> None:
    assert run("run", "pretrain", "--recipe", tiny, "--threads", "2", "-q").code == 0
    assert run("run", "finetune", "--name", "tiny", "-q").code == 0
    assert run("run", "explain", "--name", "tiny", "--threads", "1", "-q").code == 0
    runs = json.loads(Path("results/tiny/provenance.json").read_text())["runs"]
    assert [facts["machine"]["threads"] for facts in runs] == [2, 2, 1]


def test_a_study_without_sensitivity_is_shown(run: Run, tiny: str) -> None:
    outcome = run("run", "pipeline", "--recipe", tiny, "-q", "--set", "explain.sensitivity.samples=0")
    assert outcome.code == 0, outcome.err
    assert "samples is 0" in outcome.out


@pytest.mark.slow
def test_maps_without_sensitivity_are_told(run: Run, tiny: str) -> None:
    # Adam at 10 leaves no ReLU of the adapter alive, so that no input changes a logit.
    outcome = run("run", "pipeline", "--recipe", tiny, "-q", "--set", "finetune.optim.lr=10")
    assert outcome.code == 0, outcome.err
    for method in ("saliency", "gradcam", "deeplift"):
        assert f"tiny/digits: 20 of 20 {method} maps are zero everywhere and have no sensitivity" in outcome.out
    assert "zero everywhere" not in run("run", "pipeline", "--recipe", tiny, "-q", "--name", "alive").out


def test_the_last_line_of_training_is_told_once_with_the_last_loss(run: Run, tiny: str) -> None:
    outcome = run("run", "pretrain", "--recipe", tiny)
    assert outcome.code == 0, outcome.err
    *_, last = map(json.loads, Path("results/tiny/pretrain/digits/metrics.jsonl").read_text().splitlines())
    done = f"pretrain digits: {last['step']}/{last['step']}, "
    (line,) = [line for line in outcome.err.splitlines() if line.startswith(done)]
    assert line.endswith(f"loss {last['loss']:.4f}")


def test_a_nan_loss_names_the_step(run: Run, tiny: str) -> None:
    outcome = run("run", "pretrain", "--recipe", tiny, "--set", "optim.base_lr=1e30", "-q")
    assert outcome.code == 1
    assert "step " in outcome.err
    assert "optim.lr" in outcome.err


def test_an_aggregate_without_experiments(run: Run, tmp_path: Path) -> None:
    assert run("aggregate", "nowhere").code == 2
    (tmp_path / "empty").mkdir()
    assert run("aggregate", "empty").code == 2
    assert not list((tmp_path / "empty").iterdir())
    assert run("verify", "empty").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("aggregate", ""),
        ("aggregate", "results", "--out", ""),
        ("verify", ""),
        ("maps", "export", "", "--to", "npy"),
        ("maps", "export", "results/demo", "--to", "npy", "--out", ""),
        ("status", "--results", ""),
        ("data", "verify", ""),
        ("data", "fetch", "retinamnist", "--root", ""),
        ("doctor", "--profile-out", ""),
        ("bench", "maps", "--out", ""),
        ("run", "explain", "--name", "demo", "--results", ""),
        ("run", "explain", "--name", "demo", "--packs", ""),
    ],
)
def test_an_empty_path_is_not_the_working_folder(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    write_explanations(tmp_path / "results/demo", Study())
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "the path is empty" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_data_commands(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    (row,) = [row for row in json.loads(run("data", "list", "--json").out) if row["name"] == "digits"]
    assert row["state"] == "file"
    (packed,) = json.loads(run("data", "pack", "digits", "--json").out)
    assert packed["images"] == {"train": 1197, "val": 200, "test": 400}
    assert json.loads(run("data", "verify", "--json").out)[0]["digest"] == packed["digest"]
    pack = Path(packed["path"])
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 255
    pack.write_bytes(data)
    assert run("data", "verify").code == 2
    assert "digits" in run("data", "list").out
    assert run("data", "pack", "pathmnist").code == 2
    assert run("data", "fetch", "nosuchset").code == 2


def test_all_takes_what_is_here_and_says_what_is_not(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    outcome = run("run", "pretrain", "--recipe", tiny, "--datasets", "all")
    assert outcome.code == 0, outcome.err
    assert "left out: pathmnist" in outcome.err
    assert "pretrain digits" in outcome.err


def test_recipe_commands(run: Run) -> None:
    assert "pretrain/vit-base" in run("recipe", "list").out.split()
    shown = yaml.safe_load(run("recipe", "show", "finetune/report", "--set", "seed=4").out)
    assert (shown["seed"], shown["finetune"]["optim"]["lr"]) == (4, 0.1)
    assert json.loads(run("recipe", "schema").out)["title"] == "maehpc recipe"
    assert run("recipe", "show", "nothing").code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    assert "_MAEHPC_COMPLETE" in run("completion", shell).out


def maehpc(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maehpc", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_completion_completes_recipes_and_stages() -> None:
    def completed(text: str) -> set[str]:
        words = text.split(" ")
        environment = {
            **os.environ,
            "_MAEHPC_COMPLETE": "bash_complete",
            "COMP_WORDS": text,
            "COMP_CWORD": str(len(words) - 1),
        }
        return {line.split(",", 1)[1] for line in maehpc(env=environment).stdout.splitlines()}

    assert completed("maehpc run pre") == {"pretrain"}
    assert completed("maehpc run pretrain --recipe pretrain/vit-") >= {"pretrain/vit-base", "pretrain/vit-tiny"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, maehpc.cli.main as m\n"
        "sys.argv = ['maehpc', '--help']\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'zarr', 'pandas', 'timm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "aggregate" in done.stdout


@pytest.mark.slow
def test_the_debugger_opens_where_the_error_is(tiny: str, tmp_path: Path) -> None:
    done = maehpc(
        *("run", "finetune", "--recipe", tiny, "--pdb"), cwd=tmp_path, input="p 6 * 7\nq\n"
    )  # fmt: skip
    assert "(Pdb)" in done.stdout
    assert "42" in done.stdout
    assert done.returncode == 2


@pytest.mark.slow
def test_kill_minus_9_of_the_command_and_the_same_command_again(tiny: str, tmp_path: Path) -> None:
    words = ["run", "pipeline", "--recipe", tiny, "-q", "--set", "pretrain.epochs=60"]
    process = subprocess.Popen([sys.executable, "-m", "maehpc", *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        checkpoints = tmp_path / "results/tiny/pretrain/digits/checkpoints"
        while not any(int(path.name[5:]) >= 100 for path in checkpoints.glob("step-????????")):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = maehpc(*[word for word in words if word != "-q"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr


@pytest.mark.slow
def test_an_installed_wheel_works_in_any_folder(tmp_path: Path) -> None:
    checkout = shipped_folder("jobs").parent
    if not (checkout / "pyproject.toml").is_file():
        pytest.skip("these tests run from an installed package, not from a checkout")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*build, str(checkout)], check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    where = subprocess.run(
        [sys.executable, "-c", "import maehpc; print(maehpc.__file__)"],
        capture_output=True, text=True, env=environment, cwd=elsewhere, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    assert "pipeline/demo" in maehpc("recipe", "list", env=environment, cwd=elsewhere).stdout
    settings = tmp_path / "tiny.yaml"
    settings.write_text(recipe_yaml(load_recipe(None, settings=SETTINGS)))
    done = maehpc("run", "pipeline", "--recipe", str(settings), "-q", env=environment, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "results/tiny/report/index.html").is_file()


def test_explaining_all_takes_every_finished_classifier(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    refused = run("run", "explain", "--recipe", tiny, "--datasets", "all")
    assert refused.code == 2 and "no data set whose images are here has a finished classifier" in refused.err
    assert not Path("results/tiny").exists()
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays |= {f"{split}_images": rng.integers(0, 256, (12, 8, 8), dtype=np.uint8)}
        arrays |= {f"{split}_labels": np.arange(12)[:, None] % 2}
    np.savez("mine.npz", **arrays)
    given = ("--recipe", tiny, "--datasets", "digits,mine.npz", "-q")
    assert run("run", "pretrain", *given).code == run("run", "finetune", *given).code == 0
    Path("results/tiny/finetune/half").mkdir()
    outcome = run("run", "explain", "--name", "tiny", "--datasets", "all")
    assert outcome.code == 0, outcome.err
    assert "left out: half (no finished classifier)" in outcome.err
    assert {path.name for path in Path("results/tiny/maps").iterdir()} == {"digits.zarr", "mine.zarr"}
