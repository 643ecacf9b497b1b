"""A finished model behind HTTP: bounded queues, bounded uploads, health checks, the Open Inference Protocol, a page."""

import math
from dataclasses import dataclass, fields

from coatnet.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Limits of a server. `max_...` are counts, `..._seconds` times.

    Raises:
        UserError: a limit is out of range.
    """

    batch_size: int = 16  # largest batch, images
    delay_seconds: float = 0.005  # longest wait of a batch for images that are being decoded
    max_queue: int = 64  # images of one model between upload and answer
    max_bytes: int = 20 * 2**20  # of one body
    max_upload_bytes: int = 512 * 2**20  # of the bodies of all requests in progress
    max_decoding_pixels: int = 100_000_000  # of all images that are being decoded
    max_connections: int = 1024
    max_client_connections: int = 256  # of one address
    idle_seconds: int = 10  # a connection without a whole request header
    body_seconds: float = 30  # from the first to the last byte of a body
    write_seconds: float = 10  # in which a client must read 64 KB of its answer, or the rest of it
    deadline_seconds: float = 30  # from the last byte of a body to the answer
    hang_seconds: float = 30  # a batch that takes longer makes the server unready
    notice_seconds: float = 1  # between "not ready" and the end of listening, after SIGTERM
    grace_seconds: int = 30  # for the requests that are then in progress

    def __post_init__(self) -> None:
        for field in fields(self):
            value, zero = getattr(self, field.name), field.name in ("delay_seconds", "notice_seconds")
            if not (0 if zero else 1e-3) <= value < math.inf:
                raise UserError(
                    f"{field.name} is {value:g}; it must be {'0 or more' if zero else 'above 0'}, and finite"
                )
        if self.max_queue < self.batch_size:
            raise UserError(f"a queue of {self.max_queue} never fills a batch of {self.batch_size}; make it twice that")
