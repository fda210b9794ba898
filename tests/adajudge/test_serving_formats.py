"""What each endpoint takes and answers: exact shapes, offline scores, and errors that say what was wrong."""

import base64
import gzip
import json
import struct

import httpx
import pytest
from adajudge import Scorer

from tests.adajudge.servers import PROMPT, RENDERED, RESPONSE, running

ROW = {"prompt": PROMPT, "response": RESPONSE}
PAIR = {"id": "p", "prompt": PROMPT, "chosen": RESPONSE, "rejected": "the pan and the oven ."}
MESSAGES = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]


@pytest.fixture(scope="module")
def scorer():
    return Scorer.from_pretrained()


@pytest.fixture(scope="module")
def client(scorer):
    with running(scorer, model_name="judge") as client:
        yield client


@pytest.fixture(scope="module")
def offline(scorer):
    """Reward of RESPONSE, and of the other side of PAIR."""
    return [scorer.score_response(PROMPT, text).reward for text in (RESPONSE, PAIR["rejected"])]


def post(client, path, body, status=200):
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    return answer.json()


def listed(answer, prefix):
    """The data of an answer in OpenAI's frame."""
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["id"].startswith(f"{prefix}-")
    assert (answer["object"], answer["model"]) == ("list", "judge")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] > 0 == usage["completion_tokens"]
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return answer["data"]


def near(reward):
    return pytest.approx(reward, abs=1e-4)


def test_get_reward(client, offline):
    answer = post(client, "/get_reward", {"query": [RENDERED] * 2, "prompts": ["", ""], "labels": [None, 1]})
    assert answer == {"rewards": [near(offline[0])] * 2, "scores": answer["rewards"], "extra_logs": {}}


def test_get_reward_of_no_query(client):
    """OpenRLHF divides its queries among servers; the last may get none."""
    assert post(client, "/get_reward", {"query": []}) == {"rewards": [], "scores": [], "extra_logs": {}}


@pytest.mark.parametrize("body", [{"input": RENDERED}, {"input": [RENDERED]}, {"messages": MESSAGES}])
def test_classify(client, offline, body):
    (item,) = listed(post(client, "/classify", body), "classify")
    assert item == {"index": 0, "label": "LABEL_0", "probs": [near(offline[0])], "num_classes": 1}


@pytest.mark.parametrize("names", [("queries", "documents"), ("text_1", "text_2")], ids=["documents", "text"])
def test_score(client, offline, names):
    one, several = PROMPT, [PAIR["chosen"], PAIR["rejected"]]
    for queries, documents in ((one, several), ([one], several), ([one, one], several)):
        data = listed(post(client, "/score", dict(zip(names, (queries, documents), strict=True))), "score")
        assert [item["score"] for item in data] == near(offline)
        assert {item["object"] for item in data} == {"score"}
    (item,) = listed(post(client, "/score", {names[0]: one, names[1]: several[1]}), "score")
    assert item["score"] == near(offline[1])


@pytest.mark.parametrize(
    ("path", "prefix", "kind", "name"),
    [("/pooling", "pool", "pooling", "data"), ("/v1/embeddings", "embd", "embedding", "embedding")],
)
def test_vectors_of_one_number(client, offline, path, prefix, kind, name):
    (plain,) = listed(post(client, path, {"input": RENDERED}), prefix)
    assert plain == {"index": 0, "object": kind, name: [near(offline[0])]}
    (coded,) = listed(post(client, path, {"input": [RENDERED], "encoding_format": "base64"}), prefix)
    assert list(struct.unpack("<f", base64.b64decode(coded[name]))) == plain[name]


def test_rewards_are_the_records_of_files_with_errors_in_their_place(client, scorer):
    candidates = {"prompt": PROMPT, "responses": [RESPONSE, "the pan .", "the goal ."]}
    bad = {"id": "b", "prompt": PROMPT, "response": 7}
    long = {"id": "long", "prompt": PROMPT, "response": "ball " * 400}
    answer = post(client, "/v1/rewards", {"rows": [ROW, bad, PAIR, "text", long, candidates]})
    data = answer["data"]
    expected = [next(scorer.score([row])).to_record() for row in (ROW, PAIR, candidates)]
    for ours, record in zip((data[0], data[2], data[5]), expected, strict=True):
        assert set(ours) == set(record)
        for side in ("chosen", "rejected"):
            if side in ours:
                assert ours[side]["reward"] == near(record[side]["reward"])
                assert ours[side]["view_weights"] == near(record[side]["view_weights"])
    assert [item["reward"] for item in data[5]["candidates"]] == near(
        [item["reward"] for item in expected[2]["candidates"]]
    )
    assert data[0]["reward"] == near(expected[0]["reward"])
    assert data[1] == {
        "id": "b",
        "error": {
            "type": "invalid_row",
            "message": "expected a string or a list of messages, got a number",
            "row": 1,
            "field": "response",
        },
    }
    assert data[3]["error"]["message"] == "expected an object, got a string"
    assert (data[4]["id"], data[4]["error"]["field"]) == ("long", "response")
    assert "max_length is 256" in data[4]["error"]["message"]


def test_a_bad_row_of_a_format_without_errors_is_named_and_no_score_invented(client):
    body = {"query": [RENDERED, "no template at all", 7, RENDERED.replace(RESPONSE, "ball " * 400)]}
    error = post(client, "/get_reward", body, 422)["error"]
    assert (error["type"], error["row"], error["field"]) == ("invalid_row", 1, "query[1]")
    assert "3 of 4 rows cannot be scored" in error["message"]
    assert [(row["row"], row["field"]) for row in error["rows"]] == [
        (1, "query[1]"),
        (2, "query[2]"),
        (3, "query[3]"),
    ]
    assert "expected text with the judge's chat template applied" in error["rows"][0]["message"]
    assert "max_length is 256" in error["rows"][2]["message"]


INVALID = [
    ("/get_reward", {}, "query", "expected this field"),
    ("/get_reward", {"query": RENDERED}, "query", "text came, expected a list"),
    ("/get_reward", [RENDERED], None, "a list came, expected an object"),
    ("/classify", {}, None, "expected either input or messages"),
    ("/classify", {"input": RENDERED, "messages": MESSAGES}, None, "expected either input or messages"),
    ("/classify", {"input": []}, None, "an empty list came"),
    ("/classify", {"input": 7}, "input", "a number came, expected text or a list"),
    ("/classify", {"input": RENDERED, "use_activation": True}, None, "never put through a sigmoid"),
    ("/classify", {"input": RENDERED, "truncate_prompt_tokens": 8}, None, "max_length holds"),
    ("/classify", {"input": RENDERED, "chat_template": "x"}, None, "own chat template"),
    ("/classify", {"messages": MESSAGES, "add_generation_prompt": True}, None, "last message is the resp"),
    ("/classify", {"messages": MESSAGES, "tools": [{"type": "function"}]}, None, "tools: no judge would see"),
    ("/classify", {"messages": MESSAGES, "system": "s"}, None, "expected the first message"),
    ("/classify", {"messages": MESSAGES, "continue_final_message": True}, None, "expected false"),
    ("/classify", {"messages": MESSAGES[:1]}, "messages[0].role", "expected the last message from"),
    ("/classify", {"input": [[1, 2]]}, "input[0]", "token ids came"),
    ("/score", {"queries": PROMPT}, None, "expected either queries and documents"),
    ("/score", {"queries": PROMPT, "text_2": RESPONSE}, None, "expected either queries and documents"),
    ("/score", {"queries": [PROMPT] * 2, "documents": [RESPONSE] * 3}, None, "2 queries came for 3"),
    ("/score", {"queries": PROMPT, "documents": []}, None, "an empty list came"),
    ("/score", {"queries": PROMPT, "documents": [RESPONSE, None]}, "documents[1]", "expected a string"),
    ("/score", {"queries": PROMPT, "documents": ["  "]}, "response", "only white space"),
    ("/pooling", {"input": RENDERED, "task": "embed"}, "task", "'classify' or 'score'"),
    ("/v1/embeddings", {"input": RENDERED, "dimensions": 8}, None, "one dimension"),
    ("/v1/embeddings", {"input": RENDERED, "encoding_format": "hex"}, "encoding_format", "'base64'"),
    ("/v1/embeddings", {"input": "\ud800"}, "input", "half of a surrogate pair"),
    ("/v1/rewards", {"rows": []}, "rows", "at least one row"),
    ("/v1/rewards", {"rows": [ROW], "row": 1}, "row", "there is no such field"),
]


@pytest.mark.parametrize(("path", "body", "field", "message"), INVALID, ids=range(len(INVALID)))
def test_what_is_wrong_is_said_with_its_field(client, path, body, field, message):
    error = post(client, path, body, 422)["error"]
    assert set(error) <= {"type", "message", "row", "field", "rows"}
    assert message in error["message"]
    assert error.get("field") == field


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"query": ' + b"1" * 5000 + b"}",
        b'{"query": [], "query": []}',
    ],
)
def test_a_body_that_is_no_json_is_refused(client, content):
    answer = client.post("/get_reward", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_json")


def test_other_fields_of_a_client_are_let_through(client):
    body = {"input": RENDERED, "model": "any", "user": "u", "priority": 0, "use_activation": False}
    assert post(client, "/classify", body)["data"]


def test_no_nan_comes_in_or_goes_out(client):
    content = b'{"rows": [{"prompt": "x", "chosen": "a", "rejected": "b", "margin": NaN}]}'
    answer = client.post("/v1/rewards", content=content, headers={"Content-Type": "application/json"})
    assert "NaN" not in answer.text
    assert answer.json()["data"][0]["error"]["field"] == "margin"


def test_paths_and_methods_have_the_same_form_of_error(client):
    assert client.get("/nothing").json() == {
        "error": {"type": "not_found", "message": "GET /nothing: Not Found"}
    }
    assert client.get("/classify").status_code == 405
    assert client.get("/classify").json()["error"]["type"] == "method_not_allowed"


def test_health_models_and_schema(client):
    health = client.get("/health").json()
    assert (health["status"], health["accepting"], health["model"]) == ("ok", True, "judge")
    assert client.get("/v1/models").json()["data"][0]["id"] == "judge"
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/get_reward"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["query"]


def test_metrics_count_what_happened(scorer, monkeypatch):
    with running(scorer) as client:
        post(client, "/v1/rewards", {"rows": [ROW, PAIR, {}]})
        post(client, "/classify", {}, 422)
        client.get("/anything")
        monkeypatch.setattr(scorer.engine, "token_budget", 777)
        text = client.get("/metrics").text
    tokens = sum(score.prompt_tokens + score.response_tokens
                 for result in scorer.score([ROW, PAIR]) for score in result.scores)  # fmt: skip
    for line in (
        'adajudge_requests_total{endpoint="/v1/rewards",status="200"} 1.0',
        'adajudge_requests_total{endpoint="/classify",status="422"} 1.0',
        'adajudge_requests_total{endpoint="other",status="404"} 1.0',
        'adajudge_request_seconds_count{endpoint="/v1/rewards"} 1.0',
        "adajudge_rows_total 3.0",
        f"adajudge_tokens_total {float(tokens)}",
        'adajudge_bad_rows_total{type="invalid_row"} 1.0',
        'adajudge_refused_requests_total{type="invalid_request"} 1.0',
        "adajudge_token_budget 777.0",
        "adajudge_rows_accepted 0.0",
        "adajudge_rows_waiting 0.0",
        "adajudge_batch_rows_count 1.0",
        "adajudge_batch_rows_sum 3.0",
    ):
        assert line in text.splitlines(), line
    assert "adajudge_engine_busy_seconds_total 0.0\n" not in text
    assert "process_resident_memory_bytes" in text


def test_an_engine_that_fails_on_one_row_fails_it_alone(scorer, monkeypatch):
    original = scorer.engine.score

    def score(rows):
        if any(len(row) == len(scorer.encode_rendered(RENDERED)) for row in rows):
            raise RuntimeError("kernel: out of luck")
        return original(rows)

    monkeypatch.setattr(scorer.engine, "score", score)
    short = {"prompt": "tell me", "response": "the ball ."}
    with running(scorer) as client:
        data = post(client, "/v1/rewards", {"rows": [short, ROW | {"id": "bad"}, short]})["data"]
        assert [("reward" in item, "error" in item) for item in data] == [
            (True, False),
            (False, True),
            (True, False),
        ]
        assert (data[1]["id"], data[1]["error"]["type"]) == ("bad", "engine_error")
        assert "out of luck" not in data[1]["error"]["message"]
        assert post(client, "/get_reward", {"query": [RENDERED]}, 500)["error"]["type"] == "engine_error"
        assert client.get("/health").json()["status"] == "ok"  # other rows are scored
        monkeypatch.setattr(scorer.engine, "score", lambda rows: 1 / 0)
        assert post(client, "/get_reward", {"query": [RENDERED]}, 500)
        assert client.get("/health").json()["status"] == "failing"
        assert client.get("/health").status_code == 503
        monkeypatch.setattr(scorer.engine, "score", original)
        assert post(client, "/get_reward", {"query": [RENDERED]})
        assert client.get("/health").status_code == 200


def test_many_candidates_of_a_prompt_are_one_row(client, scorer):
    texts = [" ".join(["the ball ."] * (1 + i % 7)) for i in range(100)]
    bad = {"id": "bad", "prompt": PROMPT, "responses": [*texts[:99], "ball " * 400]}
    rows = [ROW, {"prompt": PROMPT, "responses": texts}, bad, ROW]
    first, many, refused, last = post(client, "/v1/rewards", {"rows": rows})["data"]
    expected = next(scorer.score([rows[1]]))
    assert [item["reward"] for item in many["candidates"]] == near([s.reward for s in expected.scores])
    assert first["reward"] == last["reward"] == near(next(scorer.score([ROW])).scores[0].reward)
    assert (refused["id"], refused["error"]["field"]) == ("bad", "responses[99]")


def test_an_error_quotes_no_megabytes(client):
    row = {"messages": [{"role": "r" * 2_000_000, "content": "x"}]}
    answer = client.post("/v1/rewards", json={"rows": [row]})
    assert "unknown role" in answer.text
    assert len(answer.content) < 2000


def test_a_row_that_breaks_the_tokenizer_is_refused_alone(scorer, monkeypatch):
    original = scorer.encoder.encode

    def encode(messages, response):
        if response == "boom":
            raise TypeError("inside a tokenizer")
        return original(messages, response)

    monkeypatch.setattr(scorer.encoder, "encode", encode)
    with running(scorer) as client:
        data = post(client, "/v1/rewards", {"rows": [ROW, ROW | {"id": "boom", "response": "boom"}]})["data"]
    assert "reward" in data[0]
    assert (data[1]["id"], data[1]["error"]["message"]) == ("boom", "it cannot be encoded: TypeError")


def test_a_client_without_json_is_told_so(client):
    answer = httpx.post(f"{client.url}/get_reward", data={"query": "x"})
    assert answer.status_code == 415
    assert "expected 'Content-Type: application/json'" in answer.json()["error"]["message"]


def test_a_compressed_body_is_refused_by_its_name(client):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(json.dumps({"query": ["x"]}).encode())
    answer = httpx.post(f"{client.url}/get_reward", content=body, headers=headers)
    assert answer.status_code == 415
    assert "Content-Encoding: gzip came" in answer.json()["error"]["message"]
