"""Which tests need packages of an extra that a machine may lack."""

import importlib.util

_SERVING = ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai", "requests", "psutil")

# On a borrowed GPU only torch and transformers may be there; `make test` installs all of them.
if any(importlib.util.find_spec(name) is None for name in _SERVING):
    collect_ignore_glob = ["test_serving_*"]
