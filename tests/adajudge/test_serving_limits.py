"""What a server refuses, and when: keys, hosts, sizes, a full queue, slow requests, clients that go away."""

import base64
import gc
import json
import socket
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import requests
from adajudge import Scorer
from adajudge.serving import Settings

from tests.adajudge.servers import PROMPT, RENDERED, RESPONSE, Slowly, running, wait_until

BODY = {"query": [RENDERED]}


@pytest.fixture(scope="module")
def scorer():
    return Scorer.from_pretrained()


@pytest.fixture
def slow(scorer):
    slowly = Slowly(scorer)
    yield slowly
    slowly.may_go_on.set()


def kind_of(answer):
    return answer.status_code, answer.json()["error"]["type"]


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_a_key_is_asked_for(scorer):
    with running(scorer, api_key="secret") as client:
        for header in ("", "Bearer", "Bearer secre", "Bearer secrets", "secret", basic("secret"), "Basic !"):
            answer = client.post("/get_reward", json=BODY, headers={"Authorization": header})
            assert kind_of(answer) == (401, "unauthorized"), header
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
            assert client.get(path).status_code == 401
        for header in ("Bearer secret", "bearer secret", basic("anybody:secret")):
            answer = client.post("/get_reward", json=BODY, headers={"Authorization": header})
            assert answer.status_code == 200, header


def test_who_has_no_key_learns_of_health_nothing_but_the_state(scorer):
    with running(scorer, api_key="secret") as client:
        assert client.get("/health").json() == {"status": "ok", "accepting": True}
        assert "model" in client.get("/health", headers={"Authorization": "Bearer secret"}).json()


@pytest.mark.parametrize("host", ["localhost:80", "127.0.0.1", "127.0.0.1:9", "[::1]:8000", "LOCALHOST"])
def test_names_of_the_loopback_are_hosts(host):
    assert Settings().accepts_host(host)


@pytest.mark.parametrize(
    "host", ["", "evil.com", "evil.com:127", "[::2]:80", "localhost.evil.com", "127.evil.com"]
)
def test_a_page_cannot_reach_the_loopback_under_its_own_name(host):
    assert not Settings().accepts_host(host)
    assert Settings(check_host=False).accepts_host(host)
    assert Settings(api_key="k").accepts_host(host)


def test_another_host_is_refused(scorer):
    with running(scorer) as client:
        answer = client.post("/get_reward", json=BODY, headers={"Host": "evil.com"})
        assert kind_of(answer) == (403, "forbidden_host")


def test_a_body_is_refused_while_it_streams_in(scorer):
    """The body never ends; the answer comes all the same."""
    with running(scorer, max_body_mb=0.01) as client:
        port = httpx.URL(client.url).port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(
                b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            for _ in range(3):  # the third is beyond the limit
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"body_too_large" in answer
        for size in (20_000, 20_000_000):  # a client that sends on before it reads, too, sees the answer
            answer = requests.post(f"{client.url}/get_reward", json={"query": ["x" * size]}, timeout=10)
            assert kind_of(answer) == (413, "body_too_large")
        assert client.post("/get_reward", json=BODY).status_code == 200
        assert client.service._held == 0


def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes(scorer):
    with running(scorer, max_body_mb=0.01) as client:
        port = httpx.URL(client.url).port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(
                b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 20000\r\n\r\n"
            )
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"the body is longer than 0.01 MiB" in answer


def test_a_response_counts_as_a_row(scorer):
    with running(scorer, max_rows=3) as client:
        three = {"prompt": PROMPT, "responses": [RESPONSE] * 3}
        assert client.post("/v1/rewards", json={"rows": [three]}).status_code == 200
        answer = client.post("/v1/rewards", json={"rows": [three, {"prompt": PROMPT, "response": RESPONSE}]})
        assert kind_of(answer) == (413, "too_many_rows")
        assert "more than 3 responses came" in answer.json()["error"]["message"]


def test_a_full_queue_is_429_with_the_time_to_come_back(scorer, slow):
    with running(slow, max_rows=2, max_queue=4) as client, ThreadPoolExecutor() as threads:
        two = {"query": [RENDERED] * 2}
        accepted = [threads.submit(client.post, "/get_reward", json=two) for _ in range(2)]
        wait_until(lambda: client.service._accepted == 4)
        answer = client.post("/get_reward", json=BODY)
        assert kind_of(answer) == (429, "overloaded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        slow.may_go_on.set()
        assert [future.result().status_code for future in accepted] == [200, 200]
        assert client.post("/get_reward", json=BODY).status_code == 200


def test_bodies_that_are_held_are_bounded_in_bytes(scorer, slow):
    with running(slow, max_body_mb=0.01) as client, ThreadPoolExecutor(8) as threads:
        body = BODY | {"labels": ["x" * 10_000]}
        accepted = [threads.submit(client.post, "/get_reward", json=body) for _ in range(8)]
        wait_until(lambda: client.service._accepted == 8)
        answer = client.post("/get_reward", json=body)
        assert kind_of(answer) == (429, "overloaded")
        assert "too many bytes" in answer.json()["error"]["message"]
        slow.may_go_on.set()
        assert {future.result().status_code for future in accepted} == {200}
        assert client.service._held == 0


def test_what_nobody_looks_at_is_not_kept_while_rows_are_scored(scorer, slow):
    many = json.dumps([[]] * 100_000).encode()
    rows = json.dumps({"rows": [{"prompt": PROMPT, "response": RESPONSE, "x": [[]] * 100_000}]}).encode()
    bodies = (("/get_reward", b'{"query": ["%s"], "labels": %s}' % (RENDERED.encode(), many)),
              ("/v1/rewards", rows))  # fmt: skip
    with running(slow) as client, ThreadPoolExecutor() as threads:
        tracemalloc.start()
        try:
            for path, body in bodies:
                slow.may_go_on.clear()
                seen, before = len(slow.batches), tracemalloc.get_traced_memory()[0]
                headers = {"Content-Type": "application/json"}
                answer = threads.submit(client.post, path, content=body, headers=headers)
                wait_until(lambda seen=seen: len(slow.batches) > seen)
                gc.collect()
                assert tracemalloc.get_traced_memory()[0] - before < len(body) / 2, path
                slow.may_go_on.set()
                assert answer.result().status_code == 200
        finally:
            slow.may_go_on.set()
            tracemalloc.stop()


def test_a_request_that_takes_too_long_is_504_and_its_rows_are_dropped(scorer, slow):
    with running(slow, timeout=0.3) as client, ThreadPoolExecutor() as threads:
        first = threads.submit(client.post, "/get_reward", json=BODY)
        wait_until(lambda: slow.batches)
        second = client.post("/get_reward", json=BODY)
        assert kind_of(second) == kind_of(first.result()) == (504, "timeout")
        assert client.service.batcher.rows_waiting == 0
        assert client.service._accepted == 0
        slow.may_go_on.set()
        assert client.post("/get_reward", json=BODY).status_code == 200
        assert slow.batches == [1, 1]


def test_a_body_that_never_ends_is_a_timeout_too(scorer):
    with running(scorer, timeout=0.3) as client:
        port = httpx.URL(client.url).port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 504 ")


def test_a_client_that_goes_away_has_its_waiting_work_dropped(scorer, slow):
    with running(slow) as client, ThreadPoolExecutor() as threads:
        first = threads.submit(client.post, "/get_reward", json=BODY)
        wait_until(lambda: slow.batches)
        body = json.dumps({"query": [RENDERED] * 3})
        head = "POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        port = httpx.URL(client.url).port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: client.service.batcher.rows_waiting == 3)
        wait_until(lambda: client.service.batcher.rows_waiting == 0)
        slow.may_go_on.set()
        assert first.result().status_code == 200
        assert slow.batches == [1]
        wait_until(lambda: client.gate.in_flight == 0)
        assert 'endpoint="/get_reward",status="499"} 1.0' in client.get("/metrics").text


def test_while_it_drains_new_work_is_503_and_accepted_work_is_answered(scorer, slow):
    with running(slow) as client, ThreadPoolExecutor() as threads:
        first = threads.submit(client.post, "/get_reward", json=BODY)
        wait_until(lambda: slow.batches)
        client.gate.draining = True
        assert kind_of(client.post("/get_reward", json=BODY)) == (503, "shutting_down")
        health = client.get("/health")
        assert health.status_code == 503
        assert (health.json()["status"], health.json()["accepting"]) == ("draining", False)
        slow.may_go_on.set()
        assert first.result().status_code == 200


def test_requests_that_wait_are_scored_together_and_one_after_another_alone(scorer, slow):
    with running(slow, max_batch_wait_ms=0) as client, ThreadPoolExecutor() as threads:
        first = threads.submit(client.post, "/get_reward", json=BODY)
        wait_until(lambda: slow.batches)
        others = [threads.submit(client.post, "/get_reward", json=BODY) for _ in range(4)]
        wait_until(lambda: client.service.batcher.rows_waiting == 4)
        slow.may_go_on.set()
        rewards = {future.result().json()["rewards"][0] for future in (first, *others)}
        assert slow.batches == [1, 4]
        assert max(rewards) - min(rewards) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows: 0 came"),
        ({"timeout": -1.0}, "timeout: -1.0 came"),
        ({"timeout": float("nan")}, "timeout: nan came"),
        ({"max_batch_wait_ms": 5000.0}, "max_batch_wait_ms: 5000.0 came"),
        ({"max_rows": 10, "max_queue": 5}, "max_queue: 5 came"),
        ({"api_key": " "}, "api_key: it is empty"),
        ({"api_key": "schlüssel"}, "api_key: expected printable ASCII"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)
