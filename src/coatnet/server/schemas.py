"""What OpenAPI says of bodies that are bytes and of answers that are built by hand."""

from typing import Any

STRING, NUMBER, WHOLE, FLAG = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}


def fields(**properties: Any) -> dict[str, Any]:
    """An object that has all of them."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def listing(items: Any) -> dict[str, Any]:
    """An array."""
    return {"type": "array", "items": items}


def answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A response in JSON."""
    return {"description": description, "content": {"application/json": {"schema": schema}}}


ERROR = fields(error=fields(code=STRING, message=STRING))
PROTOCOL_ERROR = fields(error=STRING)
REASONS = {
    400: "no HTTP, or not JSON",
    401: "a token is needed",
    404: "no such model",
    408: "the body came too slowly",
    413: "too many bytes",
    415: "no image",
    422: "an image that is of no use, or a wrong parameter",
    500: "the model failed",
    503: "too much to do; Retry-After says when to come back",
    504: "the deadline passed",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: answer(reason, ERROR) for status, reason in REASONS.items()}
PROTOCOL_ERRORS: dict[int | str, dict[str, Any]] = {
    status: answer(reason, PROTOCOL_ERROR) for status, reason in REASONS.items()
}

MODELS: dict[int | str, dict[str, Any]] = {
    200: answer(
        "what is served",
        listing(
            fields(
                name=STRING,
                variant=STRING,
                classes=WHOLE,
                class_names=listing(STRING),
                resolution=WHOLE,
                multilabel=FLAG,
                engine=STRING,
                precision=STRING,
                num_parameters=WHOLE,
                max_bytes=WHOLE,
                card=STRING,
            )
        ),
    ),
    401: ERRORS[401],
}
PREDICTION: dict[int | str, dict[str, Any]] = {
    200: answer(
        "the likeliest classes, likeliest first",
        fields(
            model=STRING,
            predictions=listing({"type": "object", "properties": {"class": STRING, "probability": NUMBER}}),
            milliseconds=fields(decode=NUMBER, queue=NUMBER, inference=NUMBER, total=NUMBER),
        ),
    )
}
IMAGE_BODY = {
    "requestBody": {
        "description": "the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF",
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

TENSOR = fields(name=STRING, shape=listing(WHOLE), datatype=STRING)
INFERENCE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "id": STRING,
                        "inputs": listing(
                            fields(
                                name={"const": "pictures"},
                                shape=listing(WHOLE),
                                datatype={"enum": ["UINT8", "BYTES"]},
                                data={"type": "array"},
                            )
                        ),
                        "outputs": listing(fields(name={"enum": ["probabilities", "class"]})),
                    },
                    "required": ["inputs"],
                }
            }
        },
    }
}
INFERENCE: dict[int | str, dict[str, Any]] = {
    200: answer(
        "the tensors that were asked for",
        {
            "type": "object",
            "properties": {"model_name": STRING, "id": STRING, "outputs": listing(TENSOR)},
            "required": ["model_name", "outputs"],
        },
    )
}
