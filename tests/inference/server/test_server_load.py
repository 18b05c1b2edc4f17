"""Many clients at once, and for long: every answer is the one that a single client gets, and nothing is kept."""

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from running_server import load, serving
from test_server_process import DEMO, started, wait_until_well

pytest_plugins = ["server_fixtures"]

ANIMALS = ("owl", "frog", "bee", "camel", "penguin", "alpaca", "cat", "dog", "fox", "hen", "cow", "yak")


def questions(count):
    """Return so many questions, no two of which are the same."""
    forms = ("Where does the {} live?", "Describe the {}.", "What does the {} eat?", "Name a {}.", "{}, why?")
    return [f"{forms[n % 5].format(ANIMALS[n // 5 % 12])} ({n // 60})" for n in range(count)]


def ask_all(url, asked, clients, **parameters):
    """Return the response to each question, of so many clients at once, and the seconds that each took."""
    found = {}

    def ask(question, client):
        since = time.perf_counter()
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16} | parameters
        response = client.post("/v1/chat/completions", json=body)
        found[question] = response, time.perf_counter() - since

    limits = httpx.Limits(max_connections=clients)
    with (
        httpx.Client(base_url=url, timeout=600, trust_env=False, limits=limits) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        list(pool.map(lambda question: ask(question, client), asked))
    return [found[question] for question in asked]


def compared(generator, running, asked, clients):
    """Ask many questions at once, print the times, and compare every answer with the one that is given alone."""
    since = time.perf_counter()
    found = ask_all(running.url, asked, clients)
    took = time.perf_counter() - since
    assert [response.status_code for response, _ in found] == [200] * len(asked)
    seconds = sorted(second for _, second in found)
    tokens = sum(response.json()["usage"]["completion_tokens"] for response, _ in found)
    p50, p95 = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
    print(
        f"{clients} clients, {len(asked)} requests: p50 {p50:.2f} s, p95 {p95:.2f} s, "
        f"{len(asked) / took:.1f} requests/s, {tokens / took:.0f} tokens/s"
    )
    answers = [response.json()["choices"][0]["message"]["content"] for response, _ in found]
    assert answers == [generator.reply(question, temperature=0, max_new_tokens=16) for question in asked]
    assert running.service.admission.taken == 0


def test_many_clients_get_what_one_gets(generator, server):
    compared(generator, server, questions(100), clients=64)


@pytest.mark.slow
def test_sixty_four_clients_five_hundred_requests():
    generator = load("demo")
    with serving(generator, max_batch=32, max_waiting=128) as running:
        compared(generator, running, questions(500), clients=64)
    generator.close()


def test_no_thread_is_left(generator):
    before = threading.active_count()
    with serving(generator) as running:
        assert {response.status_code for response, _ in ask_all(running.url, questions(30), 16)} == {200}
    end = time.monotonic() + 5
    while threading.active_count() > before + 1 and time.monotonic() < end:  # the answering one stays
        time.sleep(0.01)
    assert threading.active_count() <= before + 1


@pytest.mark.slow
def test_memory_does_not_grow(free_port):
    """From request 1,000 to request 5,000 by less than 20 MB: short answers, streams, errors, clients that leave."""
    with started(free_port, *DEMO) as process:
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        wait_until_well(process, free_port)
        reader.start()
        url, used, memory = f"http://127.0.0.1:{free_port}", [], psutil.Process(process.pid)
        for part in range(10):
            asked = [f"{question} [{part}]" for question in questions(450)]
            ask_all(url, asked[:250], 16, max_tokens=4)
            ask_all(url, asked[250:400], 16, max_tokens=4, stream=True, logprobs=True)
            ask_all(url, asked[400:], 16, temperature=-1)
            for _ in range(50):
                with (
                    httpx.Client(base_url=url, trust_env=False) as client,
                    client.stream(
                        "POST", "/v1/completions", json={"prompt": "An owl", "max_tokens": 100, "stream": True}
                    ) as response,
                ):
                    next(response.iter_raw())
            used.append(memory.memory_info().rss / 2**20)
        print("MB after every 500 requests:", *(f"{megabytes:.0f}" for megabytes in used))
        assert used[-1] - used[1] < 20
