"""ExecuTorch: a program for phones and small devices, of the network alone, one image at a time. Needs executorch.

What XNNPACK has kernels for is given to it, which is all but copies: on ARM and x86 these are the fast ones.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coatnet.bundle import Bundle
from coatnet.errors import import_extra
from coatnet.export.signature import Run, Signature
from coatnet.inference.graph import silence_exporters

FILE = "model.pte"


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write model.pte. Raises UserError if executorch is not installed."""
    with silence_exporters():
        exir = import_extra("executorch.exir", "executorch", "format executorch")
        xnnpack = import_extra(
            "executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch", "format executorch"
        )
        # XNNPACK's pass for channels-last takes weights in the order of their axes only.
        network = copy.deepcopy(signature.module(bundle)).to(memory_format=torch.contiguous_format)
        program = torch.export.export(network, (signature.example(bundle)[:1],))
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        (folder / FILE).write_bytes(lowered.to_executorch().buffer)


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the program in ExecuTorch's runtime for Python; a batch runs image by image."""
    with silence_exporters():
        runtime = import_extra("executorch.runtime", "executorch", "format executorch")
        program = runtime.Runtime.get().load_program(folder / FILE)
        method = program.load_method("forward")
    run = lambda image: method.execute([torch.from_numpy(image[None])])[0].numpy().copy()  # noqa: E731
    return lambda given: np.concatenate([run(image) for image in np.ascontiguousarray(given)])


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes logits (1, K) of the array `images`."""
    return (
        "import torch\n"
        "from executorch.runtime import Runtime\n"
        f'program = Runtime.get().load_program(folder / "{FILE}")\n'
        'logits = program.load_method("forward").execute([torch.from_numpy(images)])[0].numpy()'
    )
