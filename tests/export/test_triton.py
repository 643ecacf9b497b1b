"""A model repository is one that Triton's own schema accepts, around an ONNX model that answers."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from coatnet.bundle import load
from coatnet.cli.main import main
from coatnet.data.transforms import EvaluationTransform


@pytest.mark.slow
def test_what_the_configuration_says_is_what_the_model_has(clothes_bundle: Path, tmp_path: Path) -> None:
    assert main(["export", str(clothes_bundle), "--format", "triton", "--out", str(tmp_path / "repository")]) == 0
    (model,) = (path.parent for path in (tmp_path / "repository").glob("*/config.pbtxt"))
    text = (model / "config.pbtxt").read_text()
    session = onnxruntime.InferenceSession(str(model / "1" / "model.onnx"))
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    for tensor in (*session.get_inputs(), *session.get_outputs()):
        sizes = [size if isinstance(size, int) else -1 for size in tensor.shape[1:]]
        dims = ", ".join(map(str, sizes)) or "1"  # a number an image is a shape of 1 that is taken off
        declared = f'name: "{tensor.name}" data_type: {kinds[tensor.type]} dims: [ {dims} ]'
        assert declared in text and (("reshape: { shape: [ ] }" in text.split(declared)[1][:40]) == (not sizes))
    assert text.count("{ name: ") == len(session.get_inputs()) + len(session.get_outputs())
    assert "max_batch_size: 32" in text and 'backend: "onnxruntime"' in text
    assert (model / "labels.txt").read_text(encoding="utf-8").splitlines() == list(load(clothes_bundle).classes)


@pytest.mark.parametrize(
    "logits", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["probabilities", "logits"]
)
def test_the_repository_is_one_of_tritons(clothes_bundle: Path, tmp_path: Path, logits: bool, capsys) -> None:
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    out, options = tmp_path / "repository", ["--logits"] if logits else []
    assert main(["export", str(clothes_bundle), "--format", "triton", "--out", str(out), *options]) == 0
    assert f"--model-repository={out}" in capsys.readouterr().out
    bundle = load(clothes_bundle)
    model = out / bundle.model.variant.name
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())

    session = onnxruntime.InferenceSession(str(model / "1" / "model.onnx"))
    for declared, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [each.name for each in declared] == [each.name for each in real]
        for each, tensor in zip(declared, real, strict=True):
            # Triton's dims leave out the batch, and -1 is any.
            sizes = [size if isinstance(size, int) else -1 for size in tensor.shape[1:]]
            kind = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}[tensor.type]
            assert list(each.dims) == sizes and model_config_pb2.DataType.Name(each.data_type) == kind
    assert config.backend == "onnxruntime" and config.max_batch_size == 32 and config.name == ""
    assert config.HasField("dynamic_batching") and config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert config.output[0].label_filename == "labels.txt"
    assert (model / "labels.txt").read_text(encoding="utf-8").splitlines() == list(bundle.classes)


@pytest.mark.nightly
def test_the_model_in_it_answers_as_the_bundle_does(clothes_bundle: Path, tmp_path: Path, images) -> None:
    out = tmp_path / "repository"
    assert main(["export", str(clothes_bundle), "--format", "triton", "--out", str(out)]) == 0
    bundle = load(clothes_bundle)
    session = onnxruntime.InferenceSession(str(out / bundle.model.variant.name / "1" / "model.onnx"))
    for batch in images.values():
        with torch.no_grad():
            expected = bundle.model(EvaluationTransform(bundle.preprocessing).batch(batch)).softmax(1)
        given = np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(session.run(None, {"images": given})[0], expected.numpy(), atol=1e-3)
