"""Other packages report their use over the network by default; here their reports are switched off.

A value that the user has set is kept: `ORT_DISABLE_TELEMETRY=0` asks for the reports.
"""

import os
import sys
from typing import Any

from coatnet.errors import import_extra

# Each package reads its variable when it is imported.
SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.32: an id in ~/.cache/Microsoft, events to Microsoft
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub and datasets
    "MLFLOW_DISABLE_TELEMETRY": "true",  # mlflow 3.2, also for a store in a local file
    "WANDB_ERROR_REPORTING": "false",  # the crashes of wandb itself
}


def switch_off_telemetry() -> None:
    """Set the switches. Called when `coatnet` is imported, which is before it imports any of these packages."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    # OpenVINO and NNCF have no switch. Without this package they take a stub of their own.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    if sys.modules["openvino_telemetry"] is not None:  # the program has imported OpenVINO before coatnet
        _silence_openvino()


def _silence_openvino() -> None:
    """Decline for the user, and send nothing, where `openvino_telemetry` is imported already."""
    from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker
    from openvino_telemetry.utils.sender import TelemetrySender

    OptInChecker.check = lambda *_, **__: ConsentCheckResult.DECLINED
    TelemetrySender.send = lambda *_, **__: None


def import_onnxruntime() -> Any:
    """The module onnxruntime, sending nothing even if the program imported it before coatnet.

    Raises:
        UserError: it is not installed.
    """
    onnxruntime = import_extra("onnxruntime", "onnx", "an ONNX model")
    if os.environ.get("ORT_DISABLE_TELEMETRY") == SWITCHES["ORT_DISABLE_TELEMETRY"]:
        onnxruntime.disable_telemetry_events()
    return onnxruntime
