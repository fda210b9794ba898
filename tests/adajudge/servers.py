"""Servers for the tests: the command in a process of its own, or the application in a thread of this one."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import torch
import uvicorn
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification, Scorer
from adajudge.serving import Settings, create_app

from tests.adajudge.chat_templates.families import family_tokenizer
from tests.adajudge.judges import BACKBONES

PROMPT, RESPONSE = "tell me about sport .", "the ball and the goal ."
RENDERED = f"<user> {PROMPT} <end> <assistant> {RESPONSE} <end> "


@contextmanager
def running(scorer, **settings):
    """The application in a thread, on a free port: a client of it, with `gate` and `service` to look at."""
    gate = create_app(scorer, Settings(**settings))
    config = uvicorn.Config(gate, port=0, log_level="warning", lifespan="on", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            client.gate, client.service, client.url = gate, gate.service, url
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Process:
    """``adajudge serve`` with these options, on a free port of the loopback; or a script that does it."""

    def __init__(self, *options, script=None, **environment):
        command = [sys.executable, "-m", "adajudge.cli", "serve", "--port", "0", *options]
        if script is not None:
            command = [sys.executable, "-c", script]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment or None,
        )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on (http://\S+)\n", line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"no URL but {line!r}: {self.process.stderr.read()}")
        self.url = found[1]

    def terminate(self, sent=signal.SIGTERM):
        """Send the signal; the exit code and what was written to stderr."""
        self.process.send_signal(sent)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def kill(self):
        self.process.kill()
        self.process.communicate()


class Slowly:
    """A scorer whose engine waits until it may go on; what it was asked for is kept."""

    def __init__(self, scorer):
        self.scorer, self.engine, self.encoder = scorer, scorer.engine, scorer.encoder
        self.encode, self.encode_rendered = scorer.encode, scorer.encode_rendered
        self.may_go_on = threading.Event()
        self.batches = []

    def score_encoded(self, rows):
        self.batches.append(len(rows))
        assert self.may_go_on.wait(30)
        return self.scorer.score_encoded(rows)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def family_scorer(family, max_tokens=200, **options):
    """A tiny judge with random weights and the family's tokenizer and chat template."""
    tokenizer = family_tokenizer(family)
    torch.manual_seed(0)
    backbone = BACKBONES["qwen3"]()
    backbone.vocab_size, backbone.max_position_embeddings = len(tokenizer), max_tokens
    config = AdaJudgeConfig(
        backbone_config=backbone, num_blocks=2, expert_hidden_size=8, router_hidden_size=8
    )
    model = AdaJudgeForSequenceClassification(config)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Scorer(model, tokenizer, **options)
