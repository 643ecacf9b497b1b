"""A model repository for the Triton inference server: the ONNX model, batched on the way in.

The keys are those of Triton's model_config.proto.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatnet.bundle import Bundle
from coatnet.export.onnx import FILE, open_file, write_file
from coatnet.export.signature import Interface, Run

MAX_BATCH_SIZE = 32
MAX_DELAY = 2000  # microseconds that a request may wait for company


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with NAME/config.pbtxt, NAME/labels.txt and NAME/1/model.onnx; NAME is the network's.

    Raises:
        UserError: ONNX or ONNX Runtime is not installed.
    """
    model = folder / bundle.model.variant.name
    (model / "1").mkdir(parents=True)
    write_file(bundle, interface, metadata, model / "1" / FILE)
    (model / "config.pbtxt").write_text(configuration(bundle, interface), encoding="utf-8")
    labels = "".join(f"{' '.join(name.split())}\n" for name in bundle.classes)  # a line a class
    (model / "labels.txt").write_text(labels, encoding="utf-8", errors="backslashreplace")


def configuration(bundle: Bundle, interface: Interface) -> str:
    """The text of config.pbtxt. It has no name: the folder has, and may be renamed."""
    data_type = "TYPE_FP32" if interface.logits else "TYPE_UINT8"
    dims = ", ".join(map(str, interface.shape(bundle)[1:]))
    return f"""\
backend: "onnxruntime"
max_batch_size: {MAX_BATCH_SIZE}
input [
  {{ name: "{interface.input}" data_type: {data_type} dims: [ {dims} ] }}
]
output [
  {{ name: "{interface.output}" data_type: TYPE_FP32 dims: [ {len(bundle.classes)} ] label_filename: "labels.txt" }}
]
dynamic_batching {{ max_queue_delay_microseconds: {MAX_DELAY} }}
"""


def reopen(folder: Path, interface: Interface) -> Run:
    """The model in the repository, in ONNX Runtime, which is Triton's backend for it."""
    (path,) = folder.glob(f"*/1/{FILE}")
    return open_file(path, interface)


def snippet(folder: Path, interface: Interface) -> str:
    """How to serve the repository and to ask it."""
    (name,) = (path.name for path in folder.iterdir() if path.is_dir())
    wire = "FP32" if interface.logits else "UINT8"
    return (
        f"# tritonserver --model-repository={folder}\n"
        "import tritonclient.http\n"
        f'given = tritonclient.http.InferInput("{interface.input}", {interface.input}.shape, "{wire}")\n'
        f"given.set_data_from_numpy({interface.input})\n"
        f'answer = tritonclient.http.InferenceServerClient("localhost:8000").infer("{name}", [given])\n'
        f'{interface.output} = answer.as_numpy("{interface.output}")'
    )
