"""Where a command runs: without a network, without a home, on a full disk, with little memory, left-over variables."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training import launching

import coatnet
from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model

HERE = Path(__file__).parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and network namespaces need root")
ENGINES = ("torch", "torch-compiled", "openvino", "onnxruntime")
TRAINING = ("--model", "coatnet-femto-16", "--epochs", "0.2", "--batch_size", "32", "--num_workers", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle` and `images`."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, resolution=16).eval()
    Bundle(model, ("cat", "dog"), Preprocessing(resolution=16)).save(folder / "bundle")
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    return folder


def coatnet_command(*arguments: object, prefix: tuple[str, ...] = (), **given: object) -> subprocess.CompletedProcess:
    """Run a command to its end, with standard output and error apart."""
    command = [*prefix, sys.executable, "-m", "coatnet", *map(str, arguments)]
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": 120} | given
    return subprocess.run(command, **options)


def environment(**more: str) -> dict[str, str]:
    return launching.environment() | more


def said(errors: str) -> str:
    """Standard error without the lines that tell what a slow machine waits for."""
    return re.sub(r"^coatnet: (?!error: |warning: ).*\n", "", errors, flags=re.MULTILINE)


def assert_one_line(errors: str) -> None:
    assert said(errors).count("\n") == 1 and "Traceback" not in errors, errors


# In a process of its own, all commands one after the other: most of the time of each is the import of torch.
MANY = """
import json, sys
from coatnet.cli.main import main
for arguments in json.loads(sys.argv[1]):
    print("$", *arguments, flush=True)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    print("->", code, flush=True)
"""

# A server that answers one request and is ended.
SERVED = """
import signal, subprocess, sys, urllib.request
bundle, image = sys.argv[1:]
command = [sys.executable, "-m", "coatnet", "serve", bundle, "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
address = next(line.split()[-1] for line in server.stdout if "listening at" in line)
data = open(image, "rb").read()
request = urllib.request.Request(address + "/predict", data, {"Content-Type": "image/png"})
print(urllib.request.urlopen(request, timeout=60).read())
server.send_signal(signal.SIGTERM)
sys.exit(server.wait(60))
"""


@needs_root
@pytest.mark.timeout(1000)
@pytest.mark.fault("E0", "a network that notes every look-up, a fresh home", "no command and no engine looks up a name")
def test_nothing_calls_home(place: Path, tmp_path: Path) -> None:
    home, bundle, images = tmp_path / "home", place / "bundle", place / "images"
    home.mkdir()
    small = ("--calibration", "digits", "--max-drop", "1")
    commands = [
        ["doctor", "digits"],
        ["models", "coatnet-0"],
        ["plan", "coatnet-0", "--gpus", "8", "--gpu-memory", "24"],
        ["train", "--data", "digits", "--out", tmp_path / "run", *TRAINING],
        ["train", "--data", images, "--out", tmp_path / "none", "--init", "runs/typo"],
        ["evaluate", tmp_path / "run", "--data", "digits"],
        ["features", bundle, "--data", images, "--out", tmp_path / "features.npy"],
        ["probe", tmp_path / "run", "--data", "digits"],
        ["pack", images, tmp_path / "packed"],
        *(["predict", bundle, images, "--engine", engine] for engine in ENGINES),
        ["predict", bundle, images, "--out", tmp_path / "rows.parquet"],
        ["predict", "runs/typo", images],
        *(
            ["export", bundle, "--format", form, "--out", tmp_path / form]
            for form in ("onnx", "openvino", "torch-export", "safetensors")
        ),
        ["export", tmp_path / "run", "--format", "openvino", "--int8", *small, "--out", tmp_path / "int8"],
    ]
    given = json.dumps([list(map(str, each)) for each in commands])
    image = images / "cat" / "0.png"
    programs = [[sys.executable, "-c", MANY, given], [sys.executable, "-c", SERVED, str(bundle), str(image)]]
    found = offline(tmp_path, programs, environment(HOME=str(home), CI=""))
    (code, output, errors), served = found["ended"]
    assert code == 0, errors[-2000:]
    assert served[0] == 0 and "cat" in served[1], served
    codes = dict(re.findall(r"^\$ (.*)\n(?:.*\n)*?-> (.*)$", output, re.MULTILINE))
    refused = [command for command, code in codes.items() if code != "0"]
    assert len(codes) == len(commands) and all("typo" in command for command in refused), (refused, errors[-2000:])
    assert {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()} <= {
        (".cache", "coatnet"),
        (".cache", "matplotlib"),
        (".config", "matplotlib"),
    }


def offline(folder: Path, commands: list[list[str]], environment: dict[str, str]) -> dict:
    """Run commands in a network of their own. Fails if one of them looks up a name, or asks for an address."""
    program = ["unshare", "--net", "--mount", sys.executable, str(HERE / "offline.py"), str(folder)]
    done = subprocess.run(
        program, input=json.dumps(commands), env=environment, capture_output=True, text=True, timeout=900
    )
    if "unshare failed" in done.stderr:
        pytest.skip("this system gives no one a network namespace")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "looked-up.json").read_text())
    assert found["canary"] == [True, True], "the test would not see a look-up"
    assert found["names"] == [] and found["unreachable"] == 0
    return found


# The root of the file system becomes read-only, as by `podman --read-only`, but for /tmp, and a user without a home or
# an entry in passwd runs what follows, as by `podman --user` and systemd's DynamicUser.
CONTAINER = """
set -e
cp -r "$1" /dev/shm/place-$$
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /tmp && cd /tmp && mv /dev/shm/place-$$ place
shift; cd place
exec unshare --user --map-user=12345 --map-group=12345 env -u HOME -u XDG_CACHE_HOME -u TMPDIR "$@"
"""


def in_container(place: Path, *command: object, **variables: str) -> subprocess.Popen:
    """Start a command of coatnet in a read-only container, as a user that nobody knows."""
    program = ["unshare", "--mount", "bash", "-c", CONTAINER, "container", str(place), sys.executable, "-m", "coatnet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*program, *map(str, command)], env=environment(**variables), **pipes)


READ_ONLY = "a read-only container, a user without a home or an entry in passwd"


@needs_root
@pytest.mark.fault("E1", f"{READ_ONLY}: predict", "the graph is made in a temporary folder, with one line")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_read_only_container_predicts(place: Path, engine: str) -> None:
    started = in_container(place, "predict", "bundle", "images", "--engine", engine, COATNET_CACHE_DIR="")
    output, errors = started.communicate(timeout=120)
    assert started.returncode == 0 and output.count("\n") == 12, errors[-2000:]
    assert_one_line(errors)
    assert "there is no home folder" in errors and "made in a temporary folder" in errors


@needs_root
@pytest.mark.fault("E1", f"{READ_ONLY}: serve", "it serves, with one line")
def test_a_read_only_container_serves(place: Path) -> None:
    started = in_container(place, "serve", "bundle", "--port", "0", COATNET_CACHE_DIR="/var/cache/coatnet")
    try:
        lines = iter(started.stdout.readline, "")
        address = next(line.split()[-1] for line in lines if "listening at" in line)
        image = (place / "images" / "cat" / "0.png").read_bytes()
        request = urllib.request.Request(f"{address}/predict", image, {"Content-Type": "image/png"})
        assert b"cat" in urllib.request.urlopen(request, timeout=60).read()
    finally:
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=60)
    assert started.returncode == 0 and "/var/cache/coatnet: " in errors, errors[-2000:]


@needs_root
@pytest.mark.fault("E1", "a kept graph in a cache that is mounted read-only", "it is used, without a line")
def test_a_graph_in_a_read_only_cache_is_used(place: Path, tmp_path: Path) -> None:
    given = ("predict", place / "bundle", place / "images", "--engine", "onnxruntime")
    first = coatnet_command(*given, env=environment(COATNET_CACHE_DIR=str(tmp_path / "cache")))
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    prefix = ("unshare", "--mount", "bash", "-c", mount, "mount", str(tmp_path / "cache"))
    again = coatnet_command(*given, prefix=prefix, env=environment(COATNET_CACHE_DIR=str(tmp_path / "cache")))
    assert (again.returncode, again.stdout, said(again.stderr)) == (0, first.stdout, "")


@pytest.mark.fault("E29", "a kept graph cut or gone, {engine}", "it is made again, silently")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_damaged_graph_is_made_again(
    place: Path, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path))
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    expected = coatnet.Predictor(place / "bundle", engine)(pixels)
    (graph,) = (path for path in (tmp_path / "graphs").iterdir() if path.is_dir())
    *_, heaviest = sorted(graph.glob("model.*"), key=lambda path: path.stat().st_size)
    for damage in (lambda: heaviest.write_bytes(heaviest.read_bytes()[:1000]), heaviest.unlink):
        damage()
        assert coatnet.Predictor(place / "bundle", engine)(pixels) == expected


@pytest.mark.fault("E2", "the C++ compiler is {compiler}, {command}", "one line, nothing written")
@pytest.mark.parametrize(
    ("command", "compiler"),
    [("predict", "missing-g++"), ("train", "missing-g++"), ("export", "missing-g++"), ("predict", "false")],
)
def test_without_a_compiler_it_is_one_line(place: Path, tmp_path: Path, command: str, compiler: str) -> None:
    bundle, images, out = place / "bundle", place / "images", tmp_path / "out"
    given = {
        "predict": ("predict", bundle, images, "--engine", "torch-compiled"),
        "train": ("train", "--data", "digits", "--out", out, *TRAINING, "--compile", "true"),
        "export": ("export", bundle, "--format", "aoti", "--out", out),
    }[command]
    done = coatnet_command(*given, env=environment(CXX=compiler, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))
    assert done.returncode == 2 and "compile" in done.stderr and done.stderr.count("coatnet: error: ") == 1
    assert "Traceback" not in done.stderr and not (out / "bundle").exists()


@pytest.mark.fault("E12", "standard output on a full disk: {command}", "one line; a finished training exits 0")
@pytest.mark.parametrize("command", ["predict", "train"])
def test_standard_output_on_a_full_disk(place: Path, tmp_path: Path, command: str) -> None:
    training = ("train", "--data", "digits", "--out", tmp_path / "run", *TRAINING)
    given = training if command == "train" else ("predict", place / "bundle", place / "images")
    with open("/dev/full", "w") as full:
        done = coatnet_command(*given, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert "standard output: No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == (0 if command == "train" else 1)
    assert command == "predict" or (tmp_path / "run" / "bundle" / "model.safetensors").is_file()


@pytest.mark.fault("E12", "all three standard streams closed, as by a daemon", "the training ends with 0 and a bundle")
def test_closed_streams(tmp_path: Path) -> None:
    training = ("train", "--data", "digits", "--out", tmp_path / "run", *TRAINING)
    closed = ("bash", "-c", 'exec "$@" <&- >&- 2>&-', "closed")
    assert coatnet_command(*training, prefix=closed).returncode == 0
    assert (tmp_path / "run" / "bundle" / "model.safetensors").is_file()


@pytest.mark.fault("E12", "a reader that closes the pipe (| head)", "exit 141, without a word")
def test_a_closed_pipe(place: Path) -> None:
    shell = ("bash", "-c", 'set -o pipefail; "$@" | head -1', "shell")
    done = coatnet_command("predict", place / "bundle", *[place / "images"] * 3, "--batch-size", "1", prefix=shell)
    assert (done.returncode, said(done.stderr), done.stdout.count("\n")) == (141, "", 1)


@pytest.mark.fault("E11", "WORLD_SIZE=2 RANK=0 without peers", "one line at once; with an address, within a minute")
def test_variables_of_a_launcher_that_is_gone(tmp_path: Path) -> None:
    training = ("train", "--data", "digits", "--out", tmp_path / "run", *TRAINING)
    done = coatnet_command(*training, env=environment(WORLD_SIZE="2", RANK="0"))
    assert done.returncode == 2 and "MASTER_ADDR is not set" in done.stderr
    assert_one_line(done.stderr)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876", "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "coatnet", *map(str, training)]
    with subprocess.Popen(command, env=environment(**there), stderr=subprocess.PIPE, text=True) as waiting:
        began = time.monotonic()
        line = next(line for line in iter(waiting.stderr.readline, "") if said(line))
        assert "process 0 of 2 waits at 127.0.0.1:29876 for the others" in line and time.monotonic() - began < 60
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(20) == 130


DAEMONIC = """
import multiprocessing, sys
def work(place):
    import coatnet
    recipe = coatnet.Recipe(data=place + "/images", model="coatnet-femto-16", epochs=1, batch_size=8, num_workers=2)
    coatnet.train(recipe, sys.argv[2])
    found = coatnet.Predictor(sys.argv[2]).predict_paths([place + "/images"])
    return len(coatnet.inspect(place + "/images").describe()) > 0, len(list(found))
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [sys.argv[1]]))
"""


@pytest.mark.fault("E10", "training, doctor, predict in a daemonic process", "they work without workers, with one line")
def test_a_daemonic_process(place: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(DAEMONIC)
    program = [sys.executable, str(tmp_path / "program.py"), str(place), str(tmp_path / "run")]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "[(True, 12)]\n", done.stderr[-2000:]
    assert done.stderr.count("this process is daemonic") == 1


@pytest.mark.fault("E30", "a signal during the first second of a command", "no traceback; 130 or 143")
@pytest.mark.parametrize("command", ["predict", "serve", "train", "doctor"])
def test_a_signal_while_modules_are_imported(place: Path, tmp_path: Path, command: str) -> None:
    given = {
        "predict": ("predict", place / "bundle", place / "images"),
        "serve": ("serve", place / "bundle", "--port", "0"),
        "train": ("train", "--data", "digits", "--out", tmp_path / "run", *TRAINING),
        "doctor": ("doctor", place / "images"),
    }[command]
    for number, seconds in ((signal.SIGINT, 0.2), (signal.SIGINT, 0.5), (signal.SIGINT, 0.9), (signal.SIGTERM, 0.4)):
        program = [sys.executable, "-m", "coatnet", *map(str, given)]
        with subprocess.Popen(program, env=environment(), stderr=subprocess.PIPE, text=True) as started:
            wait_until_imported(started.pid)
            time.sleep(seconds)
            started.send_signal(number)
            assert started.wait(30) in (130, 143, -signal.SIGTERM)
            assert "Traceback" not in started.stderr.read()


def wait_until_imported(process: int) -> None:
    """Until the first lines of coatnet have run: what Python does before them is not ours."""
    while not re.search(r"^SigCgt:.*[2367abef]$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE):
        time.sleep(0.01)
    time.sleep(0.1)


@pytest.mark.fault("E31", "an address space of {megabytes} MB (ulimit -v)", "one line that says how much is needed")
@pytest.mark.parametrize("megabytes", [100, 300, 1000])
def test_little_address_space(place: Path, megabytes: int) -> None:
    limit = ("bash", "-c", f'ulimit -v {megabytes * 1000}; exec "$@"', "limit")
    for given in (("doctor", "digits"), ("predict", place / "bundle", place / "images"), ("models", "coatnet-0")):
        done = coatnet_command(*given, prefix=limit)
        assert done.returncode == 1 and "needs about 8 GB: `ulimit -v 8000000`" in done.stderr
        assert_one_line(done.stderr)
