"""What docs/serving.md and docs/rlhf.md show is what happens."""

import argparse
import json
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from adajudge import Scorer
from adajudge.cli import serve
from adajudge.scoring.engine import _BUDGET, _BUDGETS
from adajudge.serving.metrics import Metrics

from tests.adajudge.servers import running

DOCS = Path(__file__).parents[2] / "docs"
URL = "http://127.0.0.1:8000"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("serving.md", "rlhf.md")}
BLOCKS = [
    (name, language, text)
    for name, page in PAGES.items()
    for language, text in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
]
COMMANDS = [
    command
    for _, language, text in BLOCKS
    if language == "sh"
    for command in text.replace("\\\n", " ").splitlines()
    if "adajudge serve" in command
]


@pytest.fixture(scope="module")
def client():
    with running(Scorer.from_pretrained(), model_name="adajudge-built-in") as client:
        yield client


def comparable(value):
    """Without what differs from answer to answer."""
    if isinstance(value, dict):
        items = {name: comparable(item) for name, item in value.items()}
        if items.get("object") == "list":
            items |= {"created": 0, "id": items["id"].partition("-")[0]}
        return items
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return pytest.approx(value, rel=1e-3) if isinstance(value, float) else value


def test_every_request_is_answered_as_shown(client):
    shown = 0
    for (_, language, command), (_, next_language, answers) in pairwise(BLOCKS):
        if language != "sh" or not command.startswith("curl"):
            continue
        assert next_language == "json", command
        given = [curl(client, line) for line in command.split("curl ")[1:]]
        expected = list(documents(answers))
        assert comparable(given) == comparable(expected)
        shown += len(given)
    assert shown >= 6


def curl(client, line):
    """What the command would print."""
    silent, url, header, content_type, data, body = shlex.split(line)
    assert (silent, header, data) == ("-s", "-H", "-d")
    name, _, value = content_type.partition(": ")
    return client.post(url.removeprefix(URL), content=body, headers={name: value}).json()


def documents(text):
    """JSON documents one after another."""
    decoder, position = json.JSONDecoder(), 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        value, position = decoder.raw_decode(text, position)
        yield value


@pytest.mark.parametrize("block", [text for _, language, text in BLOCKS if language == "python"])
def test_the_python_blocks_run(block, client, monkeypatch):
    monkeypatch.setenv("ADAJUDGE_URL", client.url)
    monkeypatch.delenv("ADAJUDGE_API_KEY", raising=False)
    exec(compile(block.replace(URL, client.url), "docs", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_have_such_options(command):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    words = shlex.split(command, comments=True)
    args = parser.parse_args(words[words.index("serve") + 1 :])
    assert args.model == "my_judge"


def test_the_defaults_are_as_written():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    named = re.findall(r"`--(\w+)`\*{0,2} \(([\d,]+)(?: s)?\)", "".join(PAGES.values()))
    assert len(named) >= 8
    for name, value in named:
        assert parser.get_default(name) == int(value.replace(",", "")), name


def test_the_token_budgets_are_the_engines():
    budgets = f"{_BUDGETS['cpu']:,} on the CPU, else {_BUDGET:,}"
    assert f"(`--token_budget`: {budgets})" in PAGES["serving.md"]


def test_every_metric_is_listed():
    for family in Metrics().registry.collect():
        assert family.name.startswith("process_") or family.name in PAGES["serving.md"]


def test_the_verl_example_says_why_a_response_has_no_reward(client, monkeypatch):
    from examples.verl_reward import compute_score

    monkeypatch.setenv("ADAJUDGE_URL", client.url)
    with pytest.raises(RuntimeError, match=r"the judge answered 422: .*only white space"):
        compute_score("x", "  ", None, {"messages": [{"role": "user", "content": "tell me"}]})


def test_the_verl_example_asks_again_and_quotes_a_proxy(monkeypatch):
    from examples.verl_reward import compute_score

    answers = [(503, "0", b"starting"), (429, "0", b"{}"), (200, None, b'{"data": [{"probs": [1.5]}]}')]
    answers += [(502, None, b"<h1>bad gateway</h1>")]

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, again, body = answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if again is not None:
                self.send_header("Retry-After", again)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("ADAJUDGE_URL", f"http://127.0.0.1:{server.server_port}")
        question = {"messages": [{"role": "user", "content": "tell me"}]}
        assert compute_score("x", "the ball .", None, question) == 1.5
        with pytest.raises(RuntimeError, match="the judge answered 502: <h1>bad gateway</h1>"):
            compute_score("x", "the ball .", None, question)
        server.shutdown()
    assert not answers
