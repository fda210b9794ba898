"""The command: what it prints, what it refuses, how it ends."""

import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from adajudge import Scorer
from adajudge.cli import main
from adajudge.serving import Ending, Settings, bind, serve

from tests.adajudge.servers import RENDERED, Process, Slowly, wait_until

BODY = {"query": [RENDERED] * 64}


@pytest.fixture(scope="module")
def scorer():
    return Scorer.from_pretrained()


@pytest.fixture
def process():
    server = Process("--max-batch-wait-ms", "1", **os.environ, ADAJUDGE_API_KEY="secret")
    yield server
    server.kill()


def test_a_signal_ends_it_when_all_that_was_accepted_is_answered(process):
    """Clients send one request after another; the signal comes in the middle. Whoever got in is answered."""
    headers = {"Authorization": "Bearer secret"}
    assert httpx.post(f"{process.url}/get_reward", json=BODY).status_code == 401
    expected = httpx.post(f"{process.url}/get_reward", json=BODY, headers=headers).json()["rewards"]
    seen = []

    def send(_):
        with httpx.Client(headers=headers, timeout=30) as client:
            while True:
                try:
                    answer = client.post(f"{process.url}/get_reward", json=BODY)
                except httpx.ConnectError:
                    return "gone"  # nobody listens any more
                except (httpx.ReadError, httpx.RemoteProtocolError):
                    return "closed"  # an idle connection that was closed while the request was on its way
                seen.append(answer.status_code)
                if answer.status_code == 200:
                    assert answer.json()["rewards"] == pytest.approx(expected, abs=1e-4)
                else:
                    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "shutting_down")
                    time.sleep(0.05)

    with ThreadPoolExecutor(8) as threads:
        ends = threads.map(send, range(8))
        wait_until(lambda: len(seen) > 20)
        code, errors = process.terminate()
        ends = list(ends)
    assert code == 0
    assert "Traceback" not in errors
    assert errors.startswith("serving adajudge-built-in on cpu")
    assert set(ends) <= {"gone", "closed"}
    assert seen.count(200) >= 20
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{process.url}/health")


def test_a_second_interrupt_ends_it_at_once(scorer, capfd):
    slow, ended = Slowly(scorer), []

    def interrupt(url):
        def go():
            with ThreadPoolExecutor() as threads:
                request = threads.submit(httpx.post, f"{url}/get_reward", json=BODY, timeout=20)
                wait_until(lambda: slow.batches)
                for _ in range(2):
                    signal.raise_signal(signal.SIGINT)
                    time.sleep(0.3)
                ended.append(request.result().json()["error"]["type"])

        threading.Thread(target=go).start()

    before = signal.getsignal(signal.SIGINT)
    ending = serve(slow, Settings(), bind("127.0.0.1", 0), interrupt)
    assert ending == Ending(drained=False, idle=False)  # the engine still works
    wait_until(lambda: ended)
    assert ended == ["shutting_down"]
    assert signal.getsignal(signal.SIGINT) is before
    assert "Traceback" not in capfd.readouterr().err
    slow.may_go_on.set()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("adajudge")])


_HANGING = """
import sys, time
from adajudge.cli import main, serve

def load(*_):
    scorer = load_scorer(*_)
    scorer.score_encoded = lambda rows: print("busy", file=sys.stderr, flush=True) or time.sleep(600)
    return scorer

load_scorer, serve.load_scorer = serve.load_scorer, load
sys.exit(main(["serve", "--port", "0"]))
"""


def test_a_second_interrupt_ends_a_process_whose_engine_hangs():
    server = Process(script=_HANGING)
    try:
        with ThreadPoolExecutor() as threads:
            request = threads.submit(httpx.post, f"{server.url}/get_reward", json=BODY, timeout=20)
            assert any(line == "busy\n" for line in server.process.stderr)
            server.process.send_signal(signal.SIGINT)
            wait_until(lambda: httpx.get(f"{server.url}/health").json()["status"] == "draining")
            started = time.monotonic()
            code, errors = server.terminate(signal.SIGINT)
            assert time.monotonic() - started < 3
            assert request.result().json()["error"]["type"] == "shutting_down"
        assert (code, errors) == (1, "")
    finally:
        server.kill()


def refused(capsys, *options):
    assert main(["serve", *options]) == 2
    return capsys.readouterr().err


def test_an_address_that_others_reach_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("ADAJUDGE_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert f"--host {host}: others could reach it and there is no key" in refused(capsys, "--host", host)
    assert "api_key: it is empty" in refused(capsys, "--host", "0.0.0.0", "--api-key", "")
    monkeypatch.setenv("ADAJUDGE_API_KEY", "")
    assert "api_key: it is empty" in refused(capsys)


def test_wrong_options_are_said_before_the_judge_is_loaded(capsys):
    assert "max_rows: 0 came" in refused(capsys, "--max_rows", "0")
    assert "nothing: no config.json there" in refused(capsys, "--model", "nothing")
    assert "--device foo cannot be used" in refused(capsys, "--device", "foo")
    assert "max_length: 999 came" in refused(capsys, "--max-length", "999")


def test_a_crash_is_exit_code_two(capsys, monkeypatch):
    def crash(*arguments):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("adajudge.serving.serve", crash)
    said = refused(capsys)
    assert "RuntimeError: CUDA error: unspecified launch failure" in said
    assert "adajudge serve: crashed with RuntimeError" in said


def test_a_port_in_use_is_an_error_of_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(capsys, "--port", port, "--model", "no-judge-is-looked-for")
    assert f"127.0.0.1 port {port} cannot be bound: Address already in use: another program" in said
    assert "--port 0 chooses a free one" in said


def test_an_address_of_another_machine_is_an_error_of_one_line(capsys):
    assert "192.0.2.1 port 0 cannot be bound:" in refused(
        capsys, "--host", "192.0.2.1", "--insecure", "--port", "0"
    )


def test_a_port_that_there_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "70000"])
    assert ended.value.code == 2
    assert "--port: 70000 came, expected 0 to 65535" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("adajudge.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert "pip install 'adajudge-kernels[serve]'" in refused(capsys)


def test_options_from_a_file(tmp_path, capsys):
    config = tmp_path / "serve.yaml"
    config.write_text("host: 0.0.0.0\nmax_rows: 100\n")
    assert "--host 0.0.0.0: others could" in refused(capsys, "--config", str(config))
    config.write_text("max_row: 100\n")
    with pytest.raises(SystemExit):
        main(["serve", "--config", str(config)])
    assert "unknown key 'max_row'" in capsys.readouterr().err
