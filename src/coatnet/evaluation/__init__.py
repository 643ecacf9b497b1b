"""What a finished model is worth: figures with their uncertainty, the worst mistakes, features, and a linear probe."""

from coatnet.evaluation.calibrate import calibrate as calibrate
from coatnet.evaluation.evaluate import evaluate as evaluate
from coatnet.evaluation.extend import Extension as Extension
from coatnet.evaluation.extend import extend as extend
from coatnet.evaluation.features import extract_features as extract_features
from coatnet.evaluation.features import write_features as write_features
from coatnet.evaluation.label_check import LabelCheck as LabelCheck
from coatnet.evaluation.label_check import check_labels as check_labels
from coatnet.evaluation.metrics import Metrics as Metrics
from coatnet.evaluation.probe import ProbeNotWritten as ProbeNotWritten
from coatnet.evaluation.probe import ProbeReport as ProbeReport
from coatnet.evaluation.probe import probe as probe
from coatnet.evaluation.reliability import Reliability as Reliability
from coatnet.evaluation.report import Report as Report
from coatnet.evaluation.report_markdown import to_markdown as to_markdown
from coatnet.evaluation.report_markdown import write_report as write_report
from coatnet.evaluation.soup import Soup as Soup
from coatnet.evaluation.soup import soup as soup
from coatnet.evaluation.suggest import suggest as suggest

__all__ = [
    "Extension",
    "LabelCheck",
    "Metrics",
    "ProbeNotWritten",
    "ProbeReport",
    "Reliability",
    "Report",
    "Soup",
    "calibrate",
    "check_labels",
    "evaluate",
    "extend",
    "extract_features",
    "probe",
    "soup",
    "suggest",
    "to_markdown",
    "write_features",
    "write_report",
]
