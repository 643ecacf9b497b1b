"""Images a second of our engines beside timm's model, with the same weights, alternately in one process.

    python benchmarks/inference.py                              # coatnet-0 at 224, batches of 1 and 16: ten minutes
    python benchmarks/inference.py --engine openvino torch --batch-size 16

timm's model runs eagerly in fp32, and as what OpenVINO makes of it in fp32 and bf16, compiled for the size of the batch
and with as many threads as ours. It is given images that are normalized already, where ours takes uint8 images. Ours
in int8 has all layers in int8, the most that the export can reach: `coatnet export --format openvino --int8` keeps
layers in fp32 until the accuracy holds. It is calibrated on these images alone, so its answers are not those of the
export. The floor is the time that the multiply-accumulates would take at the rate of a large matrix product in the same
precision (for int8, in bf16), measured in the same process: "of the rate" is that time over the contender's. "max |d|"
is the largest difference of a logit from that of timm's eager model, over the largest of these logits.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from floor import product_rate
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rounds import alternate, spread, timed

import coatnet
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.data.transforms import Preprocessing, normalize
from coatnet.errors import UserError
from coatnet.inference.engines import ENGINES, Engine, open_engine
from coatnet.inference.graph import NormalizedNetwork, example_images, silence_exporters, to_openvino, to_program
from coatnet.inference.predictor import Predictor
from coatnet.model.complexity import complexity
from coatnet.system.hardware import keep_freed_memory, num_cores

WARMING_ROUNDS = 3  # not counted
PRECISIONS = ["fp32", "bf16", "int8"]
REST_SECONDS = 0.3  # between two contenders: threads of one runtime spin for a while, on cores that the next one needs
Work = Callable[[], NDArray[np.float32]]


def main() -> None:
    arguments = parse()
    keep_freed_memory()
    torch.manual_seed(0)
    theirs, bundle = same_weights(arguments.model)
    macs = complexity(bundle.model.variant.name, bundle.preprocessing.resolution).macs
    precisions = [each for each in arguments.precision if each != "int8"]
    engines = [engine for name in arguments.engine for engine in opened(bundle, name, precisions)]
    console = Console(width=120)
    for batch_size in arguments.batch_size:
        images = some_images(bundle, batch_size)
        works = timms(theirs, images, bundle.preprocessing)
        works |= {f"coatnet {engine.name} {engine.precision}": running(engine, images) for engine in engines}
        if "int8" in arguments.precision:
            works["coatnet openvino int8"] = in_int8(bundle, images)
        logits = {name: work() for name, work in works.items()}
        timers = {name: timed(work) for name, work in works.items()}
        seconds = alternate(timers, arguments.rounds, WARMING_ROUNDS, REST_SECONDS)
        rates = {"fp32": product_rate(torch.float32), "bf16": product_rate(torch.bfloat16)}
        rates["int8"] = rates["bf16"]
        table = Table(
            f"batch of {batch_size}", "images/s", "x timm eager", "x timm openvino bf16", "of the rate", "max |d|"
        )
        for name in works:
            share = 2 * macs * batch_size / rates[name[-4:]] / statistics.median(seconds[name])
            ratios = [ratio(seconds, name, other) for other in ("timm torch fp32", "timm openvino bf16")]
            difference = (
                np.abs(logits[name] - logits["timm torch fp32"]).max() / np.abs(logits["timm torch fp32"]).max()
            )
            rate = f"{batch_size / statistics.median(seconds[name]):.1f}"
            table.add_row(name, rate, *ratios, f"{share:.0%}", f"{difference:.0e}")
        console.print(table)
    console.print(
        f"{arguments.model}, {macs / 1e9:.2f} G multiply-accumulates an image; the products of {rates_in_words(rates)}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coatnet_0_224", help="a row of timm's")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds; the medians are printed")
    return parser.parse_args()


def same_weights(name: str) -> tuple[torch.nn.Module, coatnet.bundle.Bundle]:
    """timm's network, and ours with its weights, as the hub would carry them from one to the other."""
    import timm
    from timm.models import save_for_hf

    theirs = timm.create_model(name, num_classes=1000).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(theirs, folder, safe_serialization=True)
        return theirs, coatnet.load(folder)


def opened(bundle: coatnet.bundle.Bundle, name: str, precisions: list[str]) -> list[Engine]:
    """The engine in each precision that it has."""
    engines = []
    for precision in precisions:
        try:
            engines.append(open_engine(bundle, name, precision))
        except UserError as error:
            print(error)
    return engines


def some_images(bundle: coatnet.bundle.Bundle, number: int) -> NDArray[np.uint8]:
    """Real ones, enlarged: uint8 (N, R, R, 3)."""
    data = open_fashion_mnist_small().validation
    predictor = Predictor(bundle, "torch", "fp32")
    return np.concatenate([predictor.prepare(np.asarray(data.read(index)[0])) for index in range(number)])


def running(engine: Engine, images: NDArray[np.uint8]) -> Work:
    return lambda: engine.run(images)


def in_int8(bundle: coatnet.bundle.Bundle, images: NDArray[np.uint8]) -> Work:
    """Our graph with all layers in int8, at this batch size."""
    from coatnet.export.quantization import import_nncf

    nncf = import_nncf()
    with silence_exporters(), redirect_stdout(io.StringIO()):
        graph = to_openvino(to_program(NormalizedNetwork(bundle), example_images(bundle)))
        calibration = nncf.Dataset([image[None] for image in images])
        small = nncf.quantize(graph, calibration, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images))
    return in_openvino(small, "bf16", images)


def in_openvino(graph: Any, precision: str, images: NDArray) -> Work:
    """A graph of OpenVINO for the size of these images, with the settings of our engine."""
    import openvino

    graph.reshape(list(images.shape))  # the conversion has left dimensions free
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_NUM_THREADS"] = num_cores()
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
    return lambda: request.infer([images])[0].copy()


def timms(network: torch.nn.Module, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> dict[str, Work]:
    """timm's model as people run it: eager, and through OpenVINO where that is installed."""
    images = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), preprocessing)

    def eager() -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(images).numpy()

    works: dict[str, Work] = {"timm torch fp32": eager}
    if find_spec("openvino"):
        import openvino

        with torch.no_grad(), silence_exporters():
            graph = openvino.convert_model(torch.export.export(network, (images,)))
        given = np.ascontiguousarray(images.numpy())  # as (N, 3, R, R), which is what OpenVINO reads
        for precision, hint in (("fp32", "f32"), ("bf16", "bf16")):
            works[f"timm openvino {precision}"] = in_openvino(graph, hint, given)
    return works


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> str:
    """How many times as fast, round by round: the median, and the lowest and highest."""
    if other not in seconds:
        return "-"
    return spread([slow / fast for slow, fast in zip(seconds[other], seconds[name], strict=True)], between="-")


def rates_in_words(rates: dict[str, float]) -> str:
    return " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in rates.items())


if __name__ == "__main__":
    main()
