"""What runs on a GPU equals what runs on a CPU, in the memory that was planned: `make test-gpu`.

`COATNET_TEST_DEVICE=cpu` runs the same code on a CPU, without what only a GPU has.
"""

import io
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import plan_memory
from rich.console import Console
from tests.training.trainers import CONSTANT, RecordingConsole, trainer_for

import coatnet
from coatnet import Recipe, train
from coatnet.export import export_bundle
from coatnet.planning.memory import simulate_step
from coatnet.training.distributed.processes import Processes
from coatnet.training.interruption import Interrupted
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import Trainer

DEVICE = os.environ.get("COATNET_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no GPU"),
    # Of torch's compiler: on its own use of TorchScript, and that float32 could be TF32.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has none of it")

RECIPE = Recipe(data="digits", model="coatnet-femto-16", epochs=3.0, batch_size=64, device=DEVICE, num_workers=2)


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32: GPUs would take TF32, of 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def batch(resolution: int = 64, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 3, resolution, resolution, generator=torch.manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % 10


def network(**variations: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return coatnet.create_model("coatnet-femto", num_classes=10, resolution=64, **variations)


@pytest.mark.parametrize(
    "variations", [{}, {"downsample": "depthwise"}, {"attention": "linear", "relative_bias": False}]
)
def test_logits_and_gradients_equal_those_of_the_cpu(variations):
    images, labels = batch()
    found = []
    for device in ("cpu", DEVICE):
        model = network(**variations).to(device).train()
        logits = model(images.to(device))
        F.cross_entropy(logits, labels.to(device)).backward()
        found.append((logits.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters()}))
    (logits, gradients), (found_logits, found_gradients) = found
    torch.testing.assert_close(found_logits, logits, rtol=1e-3, atol=1e-3)
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        # Of a shift in front of a BatchNorm the gradient is zero but for rounding, so nothing to be measured against.
        error = (found_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * whole)
        assert error < 5e-3, name


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_in_bf16_stays_near_float32(compiled):
    images, _ = batch()
    model = network().to(DEVICE).eval()
    computed = torch.compile(model) if compiled else model
    with torch.no_grad():
        expected = model(images.to(DEVICE)).softmax(-1)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = computed(images.to(DEVICE)).float().softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_steps_lower_the_loss_as_on_the_cpu(algorithm):
    losses = []
    for device in ("cpu", DEVICE):
        recipe = replace(
            RECIPE,
            device=device,
            precision="fp32",
            stochastic_depth=0.0,
            schedule=CONSTANT,
            optimizer={"algorithm": algorithm},
        )
        trainer = trainer_for(recipe)
        images = torch.randn(32, 1, 8, 8, generator=torch.manual_seed(1))
        losses.append([trainer.step(images, torch.arange(32) % 10)[0] for _ in range(10)])
    assert losses[1][-1] < 0.7 * losses[1][0]
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=0.02)


@needs_cuda
def test_compiled_steps_equal_eager_ones():
    """With 7 x 7 cells, for whose relative bias torch's fused attention has other kernels than for multiples of 8."""
    losses, splits = [], coatnet.open_dataset("fashion-mnist-small")
    for compiled in (False, True):
        recipe = Recipe(data="fashion-mnist-small", model="coatnet-femto-64", batch_size=64, device=DEVICE)
        trainer = trainer_for(replace(recipe, compile=compiled, schedule=CONSTANT), splits)
        images = torch.randn(64, 1, 28, 28, generator=torch.manual_seed(1))
        losses.append([trainer.step(images, torch.arange(64) % 10)[0] for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@needs_cuda
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_a_step_waits_for_the_gpu_once(algorithm):
    """For the loss and the norm of the gradients, read together; everything else is put in its queue."""
    trainer = trainer_for(replace(RECIPE, optimizer={"algorithm": algorithm}, mixing={"mixup_alpha": 0.2}))
    images, labels = torch.randn(64, 1, 8, 8).pin_memory(), (torch.arange(64) % 10).pin_memory()
    for _ in range(2):
        trainer.step(images, labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step(images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)]
    assert len(waits) == 1, waits


@needs_cuda
def test_convolutions_are_in_channels_last():
    trainer, layouts = trainer_for(replace(RECIPE, channels=3)), []
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    trainer.step(*batch(8))
    assert layouts and all(layouts)


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    """Not to the last bit: the sums of a GPU depend on the timing of its threads."""
    quiet = Console(file=io.StringIO())
    whole = train(RECIPE, tmp_path / "whole", console=quiet)
    with pytest.raises(Interrupted):
        train(RECIPE, tmp_path / "cut", console=RecordingConsole(2))
    again = train(RECIPE, tmp_path / "cut", console=quiet)
    assert again.figures["n"] == whole.figures["n"]
    assert again.figures["top1"] == pytest.approx(whole.figures["top1"], abs=0.05)
    assert whole.figures["top1"] > 0.5


@pytest.mark.parametrize("engine", ["torch", "torch-compiled"])
def test_the_predictor_gives_the_probabilities_of_the_cpu(engine, tmp_path):
    train(RECIPE, tmp_path / "run", console=Console(file=io.StringIO()))
    images = [np.full((8, 8), level, np.uint8) for level in range(0, 250, 10)]
    found = []
    for device in ("cpu", DEVICE):
        predictor = coatnet.Predictor(tmp_path / "run", device=device, engine="torch" if device == "cpu" else engine)
        found.append([prediction.probabilities for prediction in predictor(images)])
    for expected, probabilities in zip(*found, strict=True):
        assert probabilities == pytest.approx(expected, abs=0.01)


@needs_cuda
def test_a_bundle_on_the_gpu_is_exported_as_on_the_cpu(tmp_path):
    train(RECIPE, tmp_path / "run", console=Console(file=io.StringIO()))
    bundle = coatnet.load(tmp_path / "run")
    bundle.model.to(DEVICE)
    for form in ("torch-export", "safetensors"):
        result = export_bundle(bundle, form, tmp_path / form)
        assert result.folder == tmp_path / form
    assert next(bundle.model.parameters()).device.type == "cuda"
    example = next((tmp_path / "torch-export").glob("example.*"))
    (on_cpu,) = coatnet.Predictor(tmp_path / "run", engine="torch", device="cpu")(example)
    for engine, package in (("torch", "torch"), ("openvino", "openvino"), ("onnxruntime", "onnxruntime")):
        if find_spec(package) is not None:
            (from_gpu,) = coatnet.Predictor(bundle, engine, "fp32", device="cpu")(example)
            assert from_gpu.probabilities == pytest.approx(on_cpu.probabilities, abs=1e-3)


@needs_cuda
def test_a_graph_for_the_gpu_gives_the_probabilities_of_the_cpu(tmp_path):
    """By the command and the code that it writes, as people run them: with the TF32 that torch allows by default."""
    train(RECIPE, tmp_path / "run", console=Console(file=io.StringIO()))
    given = [str(tmp_path / "run"), "--format", "torch-export", "--device", DEVICE, "--out", str(tmp_path / "out")]
    exported = subprocess.run(
        [sys.executable, "-m", "coatnet", "export", *given], capture_output=True, text=True, timeout=280
    )
    assert exported.returncode == 0, exported.stderr[-2000:]
    script = (tmp_path / "out" / "classify.py").read_text()
    assert f'.to("{DEVICE}")' in script
    example = next((tmp_path / "out").glob("example.*"))
    classified = subprocess.run(
        [sys.executable, str(tmp_path / "out" / "classify.py"), str(example)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert classified.returncode == 0, classified.stderr[-2000:]
    (expected,) = coatnet.Predictor(tmp_path / "run", device="cpu", engine="torch")(example)
    probability, name = classified.stdout.splitlines()[0].split()[:2]
    assert name == expected.classes[0]
    assert float(probability.rstrip("%")) / 100 == pytest.approx(expected.probabilities[0], abs=0.01)


@needs_cuda
@pytest.mark.parametrize("model", ["coatnet-femto", "coatnet-0"])
def test_the_memory_of_a_step_is_within_15_percent_of_the_plan(model):
    config = plan_memory.recipe_of(model, 224, 16, precision="bf16", parallelism="ddp", device=DEVICE)
    planned = simulate_step(config, num_classes=10, images_per_gpu=16, processes=Processes()).memory.total
    splits = coatnet.open_dataset("digits")
    trainer = Trainer(config, splits, RunFolder("not written", Recipe(data="digits")))
    images, labels = batch(224, 16)
    trainer.step(images, labels)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(images, labels)
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.15), asdict(config)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there is a GPU for each of two processes")
def test_two_processes_on_one_gpu_are_refused_in_one_line(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "coatnet"]
    ran = subprocess.run(
        [*launch, "train", "--data", "digits", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = [line for line in ran.stderr.splitlines() if "coatnet: error:" in line]
    assert ran.returncode != 0 and len(lines) == 1 and "has no GPU of its own" in lines[0]
    assert str(Path(coatnet.__file__).parent) not in ran.stderr  # the traceback is torchrun's own


def test_batches_are_copied_from_pinned_memory():
    trainer = trainer_for(RECIPE)
    batches = trainer.batches()
    images, labels, _ = next(batches)
    batches.close()
    assert images.is_pinned() == labels.is_pinned() == (DEVICE == "cuda")
