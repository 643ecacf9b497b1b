"""The verb that puts finished models behind HTTP."""

from collections.abc import Sequence

from coatnet.cli.arguments.serve import read_token, serve_arguments
from coatnet.cli.verbs.exit_codes import FAILED
from coatnet.errors import UserError


def serve(arguments: Sequence[str]) -> int:
    """Serve finished models until told to stop."""
    given, bundles = serve_arguments(arguments)
    token = read_token(given.token_file)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'coatnet[serve]'") from None
    from coatnet.server.main import serve as run
    from coatnet.server.settings import Settings

    chosen = {
        "batch_size": given.batch_size,
        "delay_seconds": None if given.delay_ms is None else given.delay_ms / 1e3,
        "max_queue": given.queue,
        "max_bytes": None if given.max_megabytes is None else int(given.max_megabytes * 2**20),
        "deadline_seconds": given.deadline,
    }
    settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
    answered = run(
        bundles,
        host=given.host,
        port=given.port,
        engine=given.engine,
        precision=given.precision,
        settings=settings,
        token=token,
    )
    return 0 if answered else FAILED
