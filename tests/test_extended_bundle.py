"""A model with two classes that came later, renamed or shrunk since, goes through every verb."""

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.bundle.hub_server import Hub
from tests.server.serving import program

import coatnet
from coatnet.cli.main import COMMANDS, main
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.data.datasets import ArrayDataset
from coatnet.export import FORMATS

OLD, ARRIVING = ("Trouser", "Pullover", "Ankle boot"), ("Bag", "Sneaker")
TINY = ["--model", "coatnet-femto-16", "--resolution", "16", "--num_workers", "0", "--epochs", "3"]


def write_images(root: Path, classes: dict[str, str], count: int) -> Path:
    """A folder of `count` images for each class, under its name there."""
    dataset = open_fashion_mnist_small().training
    assert isinstance(dataset, ArrayDataset)
    for name, folder in classes.items():
        (root / folder).mkdir(parents=True)
        for row in np.flatnonzero(dataset.labels == dataset.classes.index(name))[:count]:
            Image.fromarray(dataset.read(int(row))[0]).save(root / folder / f"{row}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, and of its model `ten`, extended and with a class renamed, and `few`, of which classes were merged."""
    root = tmp_path_factory.mktemp("extended")
    write_images(root / "old", {name: name for name in OLD}, 60)
    write_images(root / "new", {name: name for name in ARRIVING}, 12)
    write_images(root / "all", {name: name for name in OLD} | {"Bag": "Handbag", "Sneaker": "Sneaker"}, 40)
    write_images(root / "shoes", {name: name for name in OLD[:2]} | {"Bag": "Bag", "Sneaker": "shoe"}, 40)
    write_images(root / "dress", {"Dress": "Dress", "Coat": "Coat"}, 8)
    shutil.copy(next((root / "all/Handbag").glob("*.png")), root / "one.png")
    run, first = str(root / "run"), str(root / "first")
    assert main(["train", "--data", str(root / "old"), "--out", run, *TINY]) == 0
    assert main(["extend", run, "--data", str(root / "new"), "--old", str(root / "old"), "--out", first]) == 0
    assert main(["rename", first, "Bag=Handbag", "--out", str(root / "ten")]) == 0
    assert main(["shrink", first, "--merge", "shoe=Sneaker,Ankle boot", "--out", str(root / "few")]) == 0
    return root


# Commands on `ten`, extended and renamed, and on `few`, extended and shrunk, and what each must say. A command finds
# what earlier ones wrote.
VERBS = {
    "evaluate": [("ten --data all --split all --out measured", "Handbag")],
    "calibrate": [("few --data shoes --out calibrated", "calibrated")],
    "predict": [
        ("ten all/Handbag --engine torch --set 0.9", "Handbag"),
        ("ten all/Sneaker --engine torch --reject 0.05 --json", '"Sneaker":'),
        ("ten all --engine torch --out answers.parquet --top-k 5", "200 images"),
        ("calibrated shoes --engine torch --out answers.csv", "160 images"),
    ],
    "explain": [("ten one.png --class Handbag --out maps", "one.Handbag.png"), ("few --biases --out biases", "heads")],
    "features": [("ten --data all --out features.npy", "200 images, 128 features")],
    "probe": [("ten --data all --out probed", "5 classes")],
    "suggest": [("ten --images all --out next.csv", "200 images")],
    "doctor": [("all --labels --model ten --write fixed.csv --html suspects.html", "features of ten")],
    "train": [("finetune --init ten --data all --out tuned --num_workers 0 --epochs 0.2", "its classifier kept")],
    "compare": [("measured tuned --out compare.html", "27 images")],
    "soup": [("ten tuned --data all --out averaged", "averaged")],
    "extend": [("ten --data dress --out twelve", "added 2 classes: Coat, Dress")],
    "shrink": [("ten --drop Trouser --merge shoe=Sneaker,'Ankle boot' --out fewer", "The model of 3 classes")],
    "rename": [("ten Sneaker=Trainer --out renamed", "renamed")],
    "export": [("ten --format safetensors --out weights", "safetensors")],
    "runs": [(".", "tuned")],
}
ELSEWHERE = {"serve", "push"}  # below
WITHOUT_BUNDLE = {"models", "plan", "pack", "study"}


@pytest.mark.nightly
def test_every_command_that_takes_a_bundle_takes_an_extended_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert VERBS.keys() | ELSEWHERE | WITHOUT_BUNDLE == COMMANDS.keys()  # a new command finds its place here
    monkeypatch.chdir(place)
    for verb, calls in VERBS.items():
        for call, words in calls:
            code, said = main([verb, *shlex.split(call)]), capsys.readouterr()
            assert code == 0 and words in said.out + said.err, f"{verb} {call}: {code}\n{said.out}\n{said.err}"
    classes = coatnet.load("ten").classes
    assert set(classes) == {*OLD, "Handbag", "Sneaker"} and classes[:3] == coatnet.load("run").classes
    assert set(pq.read_table("answers.parquet")["top1"].to_pylist()) > {"Handbag", "Sneaker"}
    with open("answers.csv", newline="", encoding="utf-8") as file:
        assert {row["top1"] for row in csv.DictReader(file)} == {"Trouser", "Pullover", "Bag", "shoe"}
    figures = json.loads(Path("measured/report.json").read_text())["figures"]
    assert figures["top1"] > 0.7 and figures["n"] == 200
    assert coatnet.load("tuned").classes == tuple(sorted(classes))
    assert (
        coatnet.evaluate("tuned", "all", split="all").figures["top1"] > 0.7
    )  # nothing was learned anew in three steps
    assert coatnet.load("averaged").classes == classes and coatnet.load("calibrated").calibration is not None


@pytest.mark.nightly
def test_it_is_served_and_published(place: Path, tmp_path: Path) -> None:
    image = place / "one.png"
    (expected,) = coatnet.Predictor(place / "ten", "torch", "fp32")(image, top_k=5)
    with program(f"one={place / 'ten'}", f"two={place / 'few'}") as (_, server):
        for name, known in (("one", "Handbag"), ("two", "shoe")):
            answer = server.predict(image.read_bytes(), f"?top_k=5&model={name}")
            assert answer.status == 200 and known in answer.body.decode(), answer.body
    with Hub(tmp_path / "hub") as hub:
        surroundings = hub.environment(tmp_path / "home", HF_TOKEN="hf_ana")
        for call in (
            ["push", str(place / "ten"), "ana/ten"],
            [
                "predict",
                "hf://ana/ten",
                str(image),
                "--json",
                "--top-k",
                "5",
                "--engine",
                "torch",
                "--precision",
                "fp32",
            ],
        ):
            command = [sys.executable, "-m", "coatnet", *call]
            done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
    assert tuple(json.loads(done.stdout)["probabilities"]) == expected.classes


@pytest.mark.nightly
@pytest.mark.timeout(1200)  # AOTInductor compiles for minutes
@pytest.mark.parametrize("name", ["ten", "few"])
@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_exported_to_every_format(
    place: Path, kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is compared with the bundle on images as it is written."""
    for module in {"onnx": ["onnxscript"], "web": ["onnxscript"], "triton": ["onnxscript"]}.get(kind, [kind]):
        if module in ("onnxscript", "openvino", "executorch"):
            pytest.importorskip(module)
    if kind == "web" and not shutil.which("npm"):
        pytest.skip("needs npm")
    code = main(
        ["export", str(place / name), "--format", kind, "--data", str(place / "all"), "--out", str(tmp_path / "out")]
    )
    if kind == "timm":
        assert code == 2 and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
        return
    assert code == 0, capsys.readouterr().err
    written = "".join(path.read_text("utf-8") for path in (tmp_path / "out").rglob("*.json"))
    assert ("Handbag" if name == "ten" else "shoe") in written
