"""Clients as they are: OpenRLHF's and verl's loops rebuilt from their code, and the real openai client.

Offline is `Scorer` on the conversation itself. The templates differ in what a client may do to them: Qwen3 puts a think block
into the last turn, Llama 3 and Gemma begin with a bos token that verl takes off, Phi-3.5 has a pad of its own.
"""

import asyncio

import httpx
import openai
import pytest
import requests

from tests.adajudge.servers import family_scorer, running

CHATS = [
    [{"role": "user", "content": "What is two plus two?"}],
    [{"role": "user", "content": "hello"}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello there, how are you?"},
        {"role": "user", "content": "Another line:\n- one\n- two"},
    ],
]
RESPONSES = ["It is four.", "Hello there, how are you?\n\nThe sky is blue.", "an answer"]


@pytest.fixture(scope="module", params=["qwen3", "llama3", "gemma", "phi3.5", "mistral"])
def judge(request):
    """A judge of the family behind a server, its tokenizer, and the rewards that it gives offline."""
    scorer = family_scorer(request.param)
    rows = [{"prompt": chat, "response": text} for chat, text in zip(CHATS, RESPONSES, strict=True)]
    offline = [result.scores[0].reward for result in scorer.score(rows)]
    assert len(set(offline)) == 3
    with running(scorer) as client:
        yield client.url, scorer.encoder.tokenizer, offline


def conversations(tokenizer):
    """Each chat with its response, the chat template applied."""
    for chat, text in zip(CHATS, RESPONSES, strict=True):
        yield tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False)


def openrlhf_rewards(urls, queries, prompts, labels):
    """As OpenRLHF's RemoteRewardModel: the queries divided among the URLs, one blocking call for each."""
    share = -(-len(queries) // len(urls))
    results = []
    for i, url in enumerate(urls):
        part = slice(i * share, (i + 1) * share)
        data = {"query": queries[part], "prompts": prompts[part], "labels": labels[part]}
        answer = requests.post(url=url, json=data, headers={"Content-Type": "application/json"}, timeout=180)
        answer.raise_for_status()
        results.append(answer.json())
    return results


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_openrlhf(judge, servers):
    """Its queries are decoded token ids, padded on the right as its experience maker leaves them."""
    url, tokenizer, offline = judge
    queries = [text + (tokenizer.pad_token or "") * 3 for text in conversations(tokenizer)]
    results = openrlhf_rewards([f"{url}/get_reward"] * servers, queries, ["p"] * 3, [None] * 3)
    rewards = [reward for result in results for reward in result["rewards"]]
    assert rewards == pytest.approx(offline, abs=1e-4)
    assert all(result["scores"] == result["rewards"] for result in results)
    assert all(result["extra_logs"] == {} for result in results)


async def verl_scores(url, tokenizer, engine):
    """As verl's RewardLoopWorker: one request for each response, all at once, the bos token taken off."""

    async def score(client, text):
        if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
            text = text[len(tokenizer.bos_token) :]
        payload = {"model": "path/of/the/judge", "input": text}
        if engine == "vllm":
            answer = await client.post(f"{url}/classify", json=payload | {"use_activation": False})
            return answer.raise_for_status().json()["data"][-1]["probs"][-1]
        answer = await client.post(f"{url}/v1/embeddings", json=payload)
        return answer.raise_for_status().json()["data"][-1]["embedding"][-1]

    async with httpx.AsyncClient(timeout=None) as client:
        return await asyncio.gather(*[score(client, text) for text in conversations(tokenizer)])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verl(judge, engine):
    url, tokenizer, offline = judge
    assert asyncio.run(verl_scores(url, tokenizer, engine)) == pytest.approx(offline, abs=1e-4)


def test_the_bos_token_is_never_put_twice_nor_where_it_is_not_wanted(judge):
    url, tokenizer, offline = judge
    texts = list(conversations(tokenizer))
    answer = requests.post(f"{url}/pooling", json={"input": texts}, timeout=30).json()
    assert [item["data"][0] for item in answer["data"]] == pytest.approx(offline, abs=1e-4)
    if tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token):
        stripped = [text.removeprefix(tokenizer.bos_token) for text in texts]
        body = {"input": stripped, "add_special_tokens": False}
        answer = requests.post(f"{url}/pooling", json=body, timeout=30).json()
        without = [item["data"][0] for item in answer["data"]]
        assert without != pytest.approx(offline, abs=1e-4)
        (result,) = openrlhf_rewards([f"{url}/get_reward"], stripped, [], [])
        assert result["rewards"] == pytest.approx(without, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str
)
def test_the_openai_client(judge, options):
    """Without an encoding it asks for base64 and decodes that itself."""
    url, tokenizer, offline = judge
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        answer = client.embeddings.create(model="judge", input=list(conversations(tokenizer)), **options)
        assert client.models.list().data[0].id == "adajudge"
        with pytest.raises(openai.UnprocessableEntityError) as error:
            client.embeddings.create(model="judge", input="no template")
    assert "expected text with the judge's chat template applied" in error.value.body["message"]
    vectors = [item.embedding for item in answer.data]
    if options.get("encoding_format") == "base64":  # asked for: the client leaves it as it is
        assert all(isinstance(vector, str) for vector in vectors)
    else:
        assert [vector[-1] for vector in vectors] == pytest.approx(offline, abs=1e-4)
        assert all(len(vector) == 1 for vector in vectors)


def test_a_key_in_the_url_for_clients_that_send_no_header():
    scorer = family_scorer("qwen3")
    with running(scorer, api_key="secret") as client:
        url = f"{client.url}/get_reward"
        texts = list(conversations(scorer.encoder.tokenizer))
        with pytest.raises(requests.HTTPError, match="401"):
            openrlhf_rewards([url], texts, ["p"] * 3, [None] * 3)
        with_key = url.replace("http://", "http://key:secret@")
        (result,) = openrlhf_rewards([with_key], texts, ["p"] * 3, [None] * 3)
        assert len(result["rewards"]) == 3
        with openai.OpenAI(base_url=f"{client.url}/v1", api_key="secret") as named:
            assert named.models.list().data
        wrong = openai.OpenAI(base_url=f"{client.url}/v1", api_key="other")
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
