"""Serving: one engine behind HTTP, the requests of many clients packed together.

    gate (key, host, draining)  ->  service (limits; encodes in threads)  ->  batcher (one thread)  ->  answer

`app` has the endpoints, `formats` the wire formats, `batcher` the queue in front of the engine, `server` the process.
"""

from .app import create_app
from .server import Ending, bind, serve
from .settings import Settings, is_loopback

__all__ = ["Ending", "Settings", "bind", "create_app", "is_loopback", "serve"]
