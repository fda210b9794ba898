"""Serving: one engine behind HTTP, the requests of many clients packed together.

    gate (key, host, draining)  ->  app (limits, wire format)  ->  encode (threads)  ->  batcher (one thread)  ->  answer

`formats` has the wire formats, `batcher` the queue in front of the engine, `app` the endpoints, `server` the process.
"""

from .app import create_app
from .server import serve
from .settings import Settings, is_loopback

__all__ = ["Settings", "create_app", "is_loopback", "serve"]
