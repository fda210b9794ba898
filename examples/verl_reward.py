"""Reward function for verl: scores each response with a judge behind ``adajudge serve``.

    python -m verl.trainer.main_ppo \
        reward.custom_reward_function.path=examples/verl_reward.py reward.custom_reward_function.name=compute_score ..

The address is read from ADAJUDGE_URL (default http://127.0.0.1:8000), the key from ADAJUDGE_API_KEY. The data set keeps the
prompt's messages in ``extra_info["messages"]``. verl calls this in threads, one response at a time; the server packs them.
A server that is full (429) or shutting down (503) is asked again, when its ``Retry-After`` says so.
"""

import os
import threading

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

_local = threading.local()  # a connection for each thread
_AGAIN = Retry(
    5, status_forcelist=(429, 503), allowed_methods=("POST",), backoff_factor=0.5, raise_on_status=False
)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """The judge's reward of one response. A response that cannot be scored raises: no score is made up."""
    messages = [*extra_info["messages"], {"role": "assistant", "content": solution_str}]
    if not hasattr(_local, "session"):
        _local.session = requests.Session()
        for scheme in ("http://", "https://"):
            _local.session.mount(scheme, HTTPAdapter(max_retries=_AGAIN))
    key = os.environ.get("ADAJUDGE_API_KEY")
    answer = _local.session.post(
        os.environ.get("ADAJUDGE_URL", "http://127.0.0.1:8000") + "/classify",
        json={"messages": messages, "use_activation": False},
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=180,
    )
    if not answer.ok:
        raise RuntimeError(f"the judge answered {answer.status_code}: {_reason(answer)}")
    return answer.json()["data"][-1]["probs"][-1]


def _reason(answer):
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # of a proxy
        return answer.text
