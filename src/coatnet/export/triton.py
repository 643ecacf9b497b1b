"""A model repository for the Triton inference server: the ONNX model with dynamic batching.

The keys are those of Triton's model_config.proto.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatnet.bundle import Bundle
from coatnet.export.onnx import FILE, open_file, write_file
from coatnet.export.signature import NOVELTY, Run, Signature
from coatnet.inference.graph import INPUT

MAX_BATCH_SIZE = 32
LABELS = 'label_filename: "labels.txt"'
MAX_QUEUE_DELAY_MICROSECONDS = 2000


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write NAME/config.pbtxt, NAME/labels.txt and NAME/1/model.onnx; NAME is the network's.

    Raises:
        UserError: ONNX or ONNX Runtime is not installed.
    """
    model = folder / bundle.model.variant.name
    (model / "1").mkdir(parents=True)
    write_file(bundle, signature, metadata, model / "1" / FILE)
    (model / "config.pbtxt").write_text(configuration(bundle, signature), encoding="utf-8")
    labels = "".join(f"{' '.join(name.split())}\n" for name in bundle.classes)  # one line a class
    (model / "labels.txt").write_text(labels, encoding="utf-8", errors="backslashreplace")


def configuration(bundle: Bundle, signature: Signature) -> str:
    """The text of config.pbtxt, without a name: that is the folder's, which may be renamed."""
    data_type = "TYPE_UINT8" if signature.dtype(bundle) == "uint8" else "TYPE_FP32"
    dims = ", ".join(map(str, signature.shape(bundle)[1:]))
    outputs = [f'{{ name: "{signature.output}" data_type: TYPE_FP32 dims: [ {len(bundle.classes)} ] {LABELS} }}']
    if NOVELTY in signature.outputs(bundle):
        outputs.append(f'{{ name: "{NOVELTY}" data_type: TYPE_FP32 dims: [ 1 ] reshape: {{ shape: [ ] }} }}')
    listed = ",\n  ".join(outputs)
    return f"""\
backend: "onnxruntime"
max_batch_size: {MAX_BATCH_SIZE}
input [
  {{ name: "{INPUT}" data_type: {data_type} dims: [ {dims} ] }}
]
output [
  {listed}
]
dynamic_batching {{ max_queue_delay_microseconds: {MAX_QUEUE_DELAY_MICROSECONDS} }}
"""


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the model in ONNX Runtime, Triton's backend for it."""
    (path,) = folder.glob(f"*/1/{FILE}")
    return open_file(path, signature)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    wire = "UINT8" if signature.dtype(bundle) == "uint8" else "FP32"
    outputs = "".join(
        f'\n{name} = answer.as_numpy("{name}"){".ravel()" * (name == NOVELTY)}' for name in signature.outputs(bundle)
    )
    return (
        "import tritonclient.http  # tritonserver --model-repository=FOLDER runs\n"
        f'tensor = tritonclient.http.InferInput("{INPUT}", images.shape, "{wire}")\n'
        "tensor.set_data_from_numpy(images)\n"
        'client = tritonclient.http.InferenceServerClient("localhost:8000")\n'
        f'answer = client.infer("{bundle.model.variant.name}", [tensor]){outputs}'
    )
