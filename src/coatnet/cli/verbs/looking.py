"""The verbs that look things over: the family, data, and what a training will take."""

import json
from collections.abc import Sequence

from coatnet.cli.arguments.looking import doctor_arguments, models_arguments, pack_arguments, plan_arguments
from coatnet.cli.verbs.exit_codes import FAILED
from coatnet.cli.verbs.finished import show_bad_images


def models(arguments: Sequence[str]) -> int:
    """The family."""
    given = models_arguments(arguments)
    from rich.console import Console

    from coatnet.cli.family import measure_family, show_family

    rows = measure_family(given.names)
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


def pack(arguments: Sequence[str]) -> int:
    """Write a data source as tar shards."""
    given = pack_arguments(arguments)
    from coatnet.data.shards.pack import pack as pack_images

    packed = pack_images(given.data, given.out, shard_bytes=given.shard_size, num_workers=given.workers)
    size = f"{packed.num_shards:,} shards, {packed.num_bytes / 1e6:,.1f} MB"
    print(f"{given.out}: {packed.num_images:,} images in {size}, each read back and checked")
    return show_bad_images(packed.left_out)


def plan(arguments: Sequence[str]) -> int:
    """What a training on many GPUs will take, and how it is started."""
    given = plan_arguments(arguments)
    from rich.console import Console

    from coatnet.planning.cluster_plan import plan_training

    shown = ("launcher", "json", "data")
    wanted = {name: value for name, value in vars(given).items() if value is not None and name not in shown}
    with Console(stderr=True).status("rehearsing a step"):
        found = plan_training(**wanted, num_images=given.data)
    command = found.launch(given.launcher)
    if given.json:
        print(json.dumps({**found.to_dict(), "command": command}, indent=1))
    else:
        print(f"{found.describe()}\n\n{command}", end="")
    return 0
