"""Many clients at one server for a while: ``python -m tests.adajudge.soak --seconds 300``.

Thirty-two clients ask every endpoint for rows of all lengths; one request in a hundred is malformed, three in a hundred lose
their client in the middle. Every answer is compared with the offline score of its row, the server's memory is sampled, and in
the end the server is told to stop while all clients ask once more.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field

import httpx
import psutil

from tests.adajudge.servers import Process, family_scorer

CLIENTS = 32
MALFORMED, DISCONNECTING = 0.01, 0.03
NEAR = 1e-4
_TEXT = "the ball and the goal . we saw the pan in the kitchen and I do not know what it is called ,"
_WORDS = _TEXT.split()
_HEADERS = {"Content-Type": "application/json"}
_MALFORMED = (
    ("/get_reward", b"{", 400),
    ("/get_reward", b'{"query": "text"}', 422),
    ("/get_reward", b'{"query": ["no template"]}', 422),
    ("/classify", b'{"input": "<assistant> a <end>", "use_activation": true}', 422),
    ("/score", b'{"queries": ["a", "b"], "documents": ["c"]}', 422),
    ("/v1/rewards", b'{"rows": []}', 422),
    ("/nothing", b"{}", 404),
)


@dataclass
class Report:
    """What the clients saw."""

    seconds: float = 0.0
    rows: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    disconnected: int = 0
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB
    exit_code: int | None = None
    errors: str = ""
    processes_left: int = 0
    last_wave: dict[str, int] = field(default_factory=dict)
    counted: dict[str, float] = field(default_factory=dict)  # by the server

    def count(self, kind):
        self.answers[kind] = self.answers.get(kind, 0) + 1

    def latency(self, percent):
        """In milliseconds."""
        return 1e3 * statistics.quantiles(self.latencies, n=100)[percent - 1]

    @property
    def growth(self):
        """MiB of memory that the last quarter has beyond the second one; the first is warming up."""
        quarter = len(self.memory) // 4
        return statistics.median(self.memory[-quarter:]) - statistics.median(
            self.memory[quarter : 2 * quarter]
        )

    def __str__(self):
        total = sum(self.answers.values())
        return (
            f"{total} requests and {self.rows} rows in {self.seconds:.1f} s "
            f"({total / self.seconds:.0f} and {self.rows / self.seconds:.0f} a second); "
            f"answers {self.answers}, {self.disconnected} clients went away; "
            f"p50 {self.latency(50):.0f} ms, p99 {self.latency(99):.0f} ms; "
            f"memory {self.memory[-1]:.0f} MiB, grown by {self.growth:.1f} MiB; "
            f"the engine worked {self.counted['adajudge_engine_busy_seconds_total']:.1f} s in "
            f"{self.counted['adajudge_batch_rows_count']:.0f} batches; "
            f"last wave {self.last_wave}; exit code {self.exit_code}"
        )


class Rows:
    """Rows of mixed lengths with their offline rewards, by a tiny judge that is saved in a folder."""

    def __init__(self, folder, count=300):
        chance = random.Random(0)
        scorer = family_scorer("qwen3", max_tokens=2048)
        tokenizer = scorer.encoder.tokenizer
        scorer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        self.prompts = [" ".join(chance.choices(_WORDS, k=chance.choice((1, 4, 20, 90)))) for _ in range(20)]
        self.rows = []
        for _ in range(count):
            response = " ".join(chance.choices(_WORDS, k=int(2 ** chance.uniform(0, 7))))
            self.rows.append({"prompt": chance.choice(self.prompts), "response": response})
        self.rewards = [result.scores[0].reward for result in scorer.score(self.rows)]
        self.rendered = [
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["response"]},
                ],
                tokenize=False,
            )
            for row in self.rows
        ]

    def request(self, chance):
        """Path, body, the offline rewards, and what reads them from the answer."""
        chosen = chance.choices(range(len(self.rows)), k=int(2 ** chance.uniform(0, 5)))
        rewards = [self.rewards[i] for i in chosen]
        texts = [self.rendered[i] for i in chosen]
        kind = chance.randrange(6)
        if kind == 0:
            return "/get_reward", {"query": texts}, rewards, lambda body: body["rewards"]
        if kind == 1:
            return "/classify", {"input": texts}, rewards, lambda body: [x["probs"][0] for x in body["data"]]
        if kind == 2:
            return "/pooling", {"input": texts}, rewards, lambda body: [x["data"][0] for x in body["data"]]
        if kind == 3:
            body = {"input": texts, "model": "m"}
            return "/v1/embeddings", body, rewards, lambda body: [x["embedding"][0] for x in body["data"]]
        rows = [self.rows[i] for i in chosen]
        if kind == 4:
            pairs = {"queries": [r["prompt"] for r in rows], "documents": [r["response"] for r in rows]}
            return "/score", pairs, rewards, lambda body: [x["score"] for x in body["data"]]
        bad = {"prompt": "tell me", "response": 7}  # a bad row among good ones
        return (
            "/v1/rewards",
            {"rows": [*rows, bad]},
            rewards,
            lambda body: [x["reward"] for x in body["data"][:-1]] if "error" in body["data"][-1] else [],
        )


async def one_request(http, rows, chance, report):
    """Ask, and compare."""
    path, body, rewards, read = rows.request(chance)
    started = time.perf_counter()
    answer = await http.post(path, content=json.dumps(body), headers=_HEADERS)
    report.latencies.append(time.perf_counter() - started)
    report.count(str(answer.status_code))
    if answer.status_code != 200:
        report.wrong.append(f"{path}: {answer.status_code} {answer.text[:200]}")
        return
    served = read(answer.json())
    report.rows += len(served)
    if len(served) != len(rewards) or any(abs(a - b) > NEAR for a, b in zip(served, rewards, strict=True)):
        report.wrong.append(f"{path}: {served} instead of {rewards}")


async def malformed(http, chance, report):
    path, content, status = chance.choice(_MALFORMED)
    answer = await http.post(path, content=content, headers=_HEADERS)
    report.count(str(answer.status_code))
    if answer.status_code != status or "error" not in answer.json():
        report.wrong.append(f"{path} {content!r}: {answer.status_code} {answer.text[:200]}")


async def disconnecting(url, rows, chance, report):
    """Send all of a request or a part of it, and go away without an answer."""
    path, body, _, _ = rows.request(chance)
    content = json.dumps(body).encode()
    address = httpx.URL(url)
    _, writer = await asyncio.open_connection(address.host, address.port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
    writer.write(content if chance.random() < 0.7 else content[: len(content) // 2])
    await writer.drain()
    await asyncio.sleep(chance.uniform(0, 0.02))
    writer.transport.abort() if chance.random() < 0.5 else writer.close()
    report.disconnected += 1


async def client(number, url, rows, report, until):
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        requests = 0
        while time.monotonic() < until:
            draw = (number + requests) / 100 if requests < 3 else chance.random()  # every kind at least once
            requests += 1
            if draw < MALFORMED:
                await malformed(http, chance, report)
            elif draw < MALFORMED + DISCONNECTING:
                await disconnecting(url, rows, chance, report)
            else:
                await one_request(http, rows, chance, report)


async def sample_memory(process, report, until):
    while time.monotonic() < until:
        report.memory.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(0.1)


async def last_wave(server, rows, report):
    """Every client asks once more, and the server is told to stop: whoever was let in is answered."""

    async def ask(number, http):
        path, body, rewards, read = rows.request(random.Random(1000 + number))
        try:
            answer = await http.post(path, content=json.dumps(body), headers=_HEADERS)
        except httpx.TransportError:
            return "not let in"
        if answer.status_code == 200:
            near = all(abs(a - b) <= NEAR for a, b in zip(read(answer.json()), rewards, strict=True))
            return "answered" if near else "answered wrongly"
        return str(answer.status_code)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        asking = [asyncio.ensure_future(ask(number, http)) for number in range(CLIENTS)]
        while not all(task.done() for task in asking):
            if (await asyncio.to_thread(counted, server.url))["adajudge_rows_accepted"]:
                break
        ending = asyncio.to_thread(server.terminate)
        ends, (report.exit_code, report.errors) = await asyncio.gather(asyncio.gather(*asking), ending)
    for end in ends:
        report.last_wave[end] = report.last_wave.get(end, 0) + 1


def counted(url):
    """What the server's own metrics say."""
    samples = (
        line.rpartition(" ") for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#"
    )
    return {name: float(value) for name, _, value in samples}


def soak(seconds):
    """Run it; the report."""
    with tempfile.TemporaryDirectory() as folder:
        rows, report = Rows(folder), Report()
        server = Process("--model", folder)
    try:
        process = psutil.Process(server.process.pid)

        async def run():
            started = time.monotonic()
            until = started + seconds
            clients = [client(number, server.url, rows, report, until) for number in range(CLIENTS)]
            await asyncio.gather(sample_memory(process, report, until), *clients)
            report.seconds = time.monotonic() - started
            await asyncio.sleep(0.3)  # what was abandoned is dropped
            report.counted = counted(server.url)
            family = [process, *process.children(recursive=True)]
            await last_wave(server, rows, report)
            report.processes_left = sum(member.is_running() for member in family)

        asyncio.run(run())
    finally:
        server.kill()
    return report


def problems(report):
    """What of the report may not be."""
    found = report.wrong[:5]
    statuses = {"200", "400", "422", "404"}
    if set(report.answers) - statuses:
        found.append(f"unexpected answers: {report.answers}")
    answered = sum(
        value
        for name, value in report.counted.items()
        if name.startswith("adajudge_requests_total")
        and 'status="499"' not in name
        and "/metrics" not in name
    )
    total = sum(report.answers.values())
    if (
        not total <= answered <= total + report.disconnected
    ):  # some were answered before their client went away
        found.append(f"the server answered {answered} requests, the clients have {total}")
    for name in ("adajudge_rows_accepted", "adajudge_rows_waiting"):
        if report.counted[name] != 0:
            found.append(f"{name} is {report.counted[name]} when all is done")
    if report.growth > 24:
        found.append(f"memory has grown by {report.growth:.1f} MiB")
    if report.exit_code != 0 or "Traceback" in report.errors or report.processes_left:
        found.append(f"exit code {report.exit_code}, {report.processes_left} processes left: {report.errors}")
    if set(report.last_wave) - {"answered", "503", "not let in"} or not report.last_wave.get("answered"):
        found.append(f"last wave: {report.last_wave}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    report = soak(parser.parse_args().seconds)
    print(report)
    found = problems(report)
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
