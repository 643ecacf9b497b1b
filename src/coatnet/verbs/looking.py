"""The verbs that look things over: the family, and data."""

import json
from collections.abc import Sequence

from coatnet.arguments.looking import doctor_arguments, models_arguments
from coatnet.verbs.exit_codes import FAILED


def models(arguments: Sequence[str]) -> int:
    """The family."""
    given = models_arguments(arguments)
    from rich.console import Console

    from coatnet.family import measure_family, show_family

    rows = measure_family(given.names, shown_only=not given.json)
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        show_family(rows, Console(highlight=False))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Look a data source over before training on it."""
    given = doctor_arguments(arguments)
    from coatnet.data.inspection import inspect

    inspection = inspect(given.data, strict=given.strict)
    print(inspection.describe())
    return 0 if inspection.healthy else FAILED
