"""As a new user at the shell: models from the hub in one command each, and back to it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tests.bundle.hub_server import Hub
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import save_for_hf

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model

ID = "timm/coatnet_nano_rw_224.sw_in1k"
SMALL_ID = "timm/test_coatnet.made_up"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def coatnet(hub: Hub, tmp_path: Path) -> Run:
    """The program in a process of its own, with the local hub."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "coatnet", *map(str, arguments)]
        surroundings = hub.environment(tmp_path / "home", **environment)
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=200)

    return run


def publish(hub: Hub, repo_id: str, folder: Path, **arguments: object) -> torch.nn.Module:
    """A checkpoint made by timm itself, with random weights, on the hub."""
    torch.manual_seed(0)
    model = timm.create_model(repo_id.partition("/")[2].partition(".")[0], **arguments).eval()
    save_for_hf(model, str(folder), safe_serialization=True)
    hub.add(repo_id, folder)
    return model


def images(folder: Path, classes: tuple[str, ...] = ("dark", "light"), number: int = 12) -> Path:
    """An image folder whose classes differ in brightness."""
    random = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(number):
            pixels = random.integers(100 * index, 100 * index + 100, (80, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.jpg")
    return folder


@pytest.mark.slow
def test_predict_by_hub_id_gives_the_top_class_of_timm_in_words(hub: Hub, coatnet: Run, tmp_path: Path) -> None:
    theirs = publish(hub, ID, tmp_path / "nano")
    image = next(images(tmp_path / "pictures").rglob("*.jpg"))
    done = coatnet("predict", ID, image, "--json", "--top-k", "1000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["probabilities"]
    assert {"tench", "daisy", "crane (bird)", "crane (machine)"} <= found.keys() and len(found) == 1000

    transform = create_transform(**resolve_model_data_config(theirs))
    with torch.no_grad():
        expected = theirs(transform(Image.open(image))[None])[0].softmax(0)
    probabilities = torch.tensor(sorted(found.values()))
    torch.testing.assert_close(probabilities, expected.sort().values, rtol=0.05, atol=1e-4)
    words = ImageNetInfo("imagenet-1k").index_to_description(int(expected.argmax()))
    assert max(found, key=lambda name: found[name]).partition(" (")[0] in words

    hub.stop()
    again = coatnet("predict", ID, image, "--json", "--top-k", "1000", HF_HUB_OFFLINE="1")
    hub.start()
    assert json.loads(again.stdout)["probabilities"] == found


@pytest.mark.slow
def test_finetuning_from_a_hub_id_learns_a_folder_of_images(hub: Hub, coatnet: Run, tmp_path: Path) -> None:
    publish(hub, SMALL_ID, tmp_path / "small", num_classes=5, img_size=64)
    folder, run = images(tmp_path / "pictures"), tmp_path / "run"
    options = ("--epochs", "6", "--optimizer.learning_rate", "0.003", "--freeze", "stem")
    done = coatnet("train", "finetune", "--init", SMALL_ID, "--data", folder, "--out", run, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["model"] == "test_coatnet" and report["figures"]["top1"] == 1.0
    assert f"init: {SMALL_ID}\n" in (run / "recipe.yaml").read_text()


def test_a_wrong_hub_id_suggests_the_nearest(coatnet: Run, tmp_path: Path) -> None:
    done = coatnet("predict", "timm/coatnet_0_rw_224.sw_in1", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean 'timm/coatnet_0_rw_224.sw_in1k'" in done.stderr


@pytest.mark.slow
def test_a_pushed_model_predicts_the_same(hub: Hub, coatnet: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("test_coatnet", num_classes=2, resolution=64).eval()
    folder = images(tmp_path / "pictures", number=4)
    bundle = Bundle(model, ("dark", "light"), Preprocessing(resolution=64)).save(tmp_path / "bundle")
    refused = coatnet("push", bundle, "ana/brightness")
    assert refused.returncode == 2 and "HF_TOKEN" in refused.stderr
    pushed = coatnet("push", "~/bundle", "ana/brightness", HF_TOKEN="hf_ana", HOME=str(tmp_path))
    assert pushed.returncode == 0 and "ana/brightness" in pushed.stdout, pushed.stderr
    here, there = (coatnet("predict", source, folder, "--json") for source in (bundle, "hf://ana/brightness"))
    assert here.returncode == 0 and here.stdout == there.stdout


SEVERAL = """
import shutil, sys
import coatnet.evaluation.probe
from coatnet.cli.main import main
from coatnet.system import terminal
terminal.REPORTED_WAIT_SECONDS = 3600
sys.modules["coatnet.evaluation.probe"].L2_STRENGTHS = (1e-1,)  # the search takes most of the time
"""


@pytest.mark.slow
def test_auto_takes_one_network_and_keeps_it_without_a_network(hub: Hub, tmp_path: Path) -> None:
    """The nano's id, with a smaller network behind it; the commands of a situation share a process."""
    publish(hub, SMALL_ID, tmp_path / "small", img_size=64)
    first = hub.add(ID, tmp_path / "small")
    folder, run, probed = images(tmp_path / "pictures", number=8), tmp_path / "run", tmp_path / "probed"
    options = ["--data", str(folder), "--device", "cpu"]
    train = ["train", *options, "--init", "auto", "--num_workers", "0", "--freeze", "stem,stages.0,stages.1"]

    def call(*lines: object, **environment: str) -> subprocess.CompletedProcess[str]:
        program = SEVERAL + "\n".join(
            f"print({line})" if isinstance(line, str) else f"print(main({line!r}))" for line in lines
        )
        surroundings = hub.environment(tmp_path / "home", OMP_NUM_THREADS="1", **environment)
        return subprocess.run([sys.executable, "-c", program], env=surroundings, capture_output=True, text=True)

    done = call(["probe", "auto", *options, "--out", str(probed)], [*train, "--epochs", "1", "--out", str(run)])
    assert done.stdout.count("\n0\n") == 2, done.stderr
    size = round((tmp_path / "small" / "model.safetensors").stat().st_size / 1e6)
    lines = [line for line in done.stderr.splitlines() if "auto takes" in line]
    assert lines[0].startswith(f"coatnet: auto takes {ID} (15.1 M parameters): the cheapest to compute")
    assert lines[0].endswith(f"; {size} MB to download") and lines[1].endswith("; in the cache already")
    assert f"\ninit: {ID}@{first}\n" in (run / "recipe.yaml").read_text() and "--init auto would" not in done.stderr
    assert json.loads((probed / "bundle" / "config.json").read_text())["record"]["probe"]["model"] == f"{ID}@{first}"

    (tmp_path / "small" / "README.md").write_text("another commit")
    assert hub.add(ID, tmp_path / "small") != first
    hub.stop()
    more = [*train, "--epochs", "2", "--out", str(run)]
    new = [*train, "--epochs", "1", "--out", str(tmp_path / "new")]
    gone = f"shutil.rmtree({str(tmp_path / 'home' / 'hub')!r})"
    offline = call(more, gone, new, ["probe", "timm/coatnet_nano_rw_224.sw_in1", *options])
    hub.start()
    assert offline.stdout.split() == [*offline.stdout.split()[:-3], "None", "2", "2"], offline.stderr
    assert "resuming" in offline.stderr and f"\ninit: {ID}@{first}\n" in (run / "recipe.yaml").read_text()
    refused, misspelled = [line for line in offline.stderr.splitlines() if "error" in line]
    assert refused.startswith(f"coatnet: error: auto takes {ID} (") and "cannot be reached" in refused
    assert f"run `hf download {ID}" in refused and refused.endswith("folder of this machine, or leave init out")
    assert not (tmp_path / "new").exists()
    assert f"did you mean {ID!r}" in misspelled
