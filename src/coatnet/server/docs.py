"""The API's documentation at /docs: Swagger UI from an installed package, nothing from elsewhere."""

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.staticfiles import StaticFiles

from coatnet.errors import UserError

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>coatnet: the API</title>
<link rel="icon" href="/favicon.svg">
<link rel="stylesheet" href="/docs/files/swagger-ui.css">
<div id="docs"></div>
<script src="/docs/files/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
START = 'SwaggerUIBundle({ url: "/openapi.json", dom_id: "#docs", validatorUrl: null });\n'


def add_docs(app: FastAPI) -> None:
    """Everything under /docs. Raises UserError if the files of Swagger UI are not installed."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise UserError("the server needs fastapi-offline: pip install 'coatnet[serve]'")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(PAGE, media_type="text/html")

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript")

    app.mount("/docs/files", StaticFiles(directory=Path(package.origin).with_name("static")))
