"""The service over a real engine: what a request gives never depends on its neighbours. Equality is required, because
every forward has the same shape."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Handle, Service
from tests.conftest import DEMO, THREADS, Workshop

NUM_SLOTS = 4
OPTIONS = {"max_new_tokens": 96}


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> Model:
    return load(workshop.bundle("demo").path, threads=THREADS, num_slots=NUM_SLOTS, prefix_cache_bytes=0)


def questions(count: int) -> list[str]:
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def test_requests_decode_as_alone_in_any_mix_and_order(model: Model):
    prompts = questions(40)
    with Service(model) as service:
        alone = [service.submit(prompt, **OPTIONS).result().token_ids for prompt in prompts]
        assert [found.token_ids for found in service.generate(prompts, **OPTIONS)] == alone
        order = random.Random(1).sample(range(len(prompts)), len(prompts))
        mixed = service.generate([prompts[index] for index in order], **OPTIONS)
    assert [found.token_ids for found in mixed] == [alone[index] for index in order]


@pytest.mark.parametrize("method", ["jacobi-block", "autoregressive"])
def test_loops_may_differ_between_neighbours(model: Model, method: str):
    prompts = questions(12)
    with Service(model) as service:
        alone = [service.submit(prompt, **OPTIONS).result().token_ids for prompt in prompts]
        handles = [
            service.submit(prompt, method=method if index % 2 else "jacobi", **OPTIONS)
            for index, prompt in enumerate(prompts)
        ]
        assert [handle.result().token_ids for handle in handles] == alone


def test_sampled_and_greedy_requests_share_a_batch(model: Model):
    prompts = questions(12)
    options: list[dict[str, Any]] = [
        {"temperature": 0.9 if index % 3 else 0.0, "seed": index, "logprobs": 1 if index % 2 else None}
        for index in range(len(prompts))
    ]
    with Service(model) as service:
        requests = list(zip(prompts, options, strict=True))
        alone = [service.submit(prompt, **OPTIONS, **extra).result() for prompt, extra in requests]
        handles = [service.submit(prompt, **OPTIONS, **extra) for prompt, extra in requests]
        found = [handle.result() for handle in handles]
    assert [entry.token_ids for entry in found] == [entry.token_ids for entry in alone]
    assert [entry.logprobs for entry in found] == [entry.logprobs for entry in alone]


@pytest.mark.slow
def test_two_hundred_requests_decode_as_alone_at_every_occupancy_and_in_every_order(model: Model):
    """Every other one is sampled. Alone, then as 2, 3 and 4 clients that send one after another, then all at once."""
    prompts = questions(200)
    requests = [
        (prompt, {**OPTIONS, "temperature": 0.8 * (index % 2), "seed": index}) for index, prompt in enumerate(prompts)
    ]
    with Service(model) as service:
        alone = [service.submit(prompt, **options).result().token_ids for prompt, options in requests]
        for clients in (2, 3, NUM_SLOTS, len(requests)):
            order = random.Random(clients).sample(range(len(requests)), len(requests))
            handles: dict[int, Handle] = {}
            for place, index in enumerate(order):
                if place >= clients:
                    handles[order[place - clients]].result()
                handles[index] = service.submit(requests[index][0], **requests[index][1])
            found = [handles[index].result().token_ids for index in range(len(requests))]
            assert found == alone, f"{clients} clients"


@pytest.mark.slow
def test_twenty_thousand_short_requests_leave_slots_and_memory_clean(model: Model):
    """Random lengths, stop strings, loops, seeds and cancels; every hundredth request that ran to its end is compared
    with the same one alone."""
    import psutil

    generator = random.Random(0)
    prompts = questions(100)
    kept: list[tuple[str, dict[str, object], Handle]] = []
    sizes: list[int] = []
    with Service(model, queue_size=32) as service:
        for number in range(20_000):
            prompt = generator.choice(prompts)
            options: dict[str, object] = {
                "max_new_tokens": generator.randint(1, 12),
                "stop": generator.choice([(), ("FROM",), (",", "COUNT(")]),
                "method": generator.choice(["jacobi", "jacobi-block", "autoregressive"]),
                "temperature": generator.choice([0.0, 0.0, 0.9]),
                "seed": generator.randint(0, 1 << 40),
            }
            while service.num_open >= NUM_SLOTS + 32:
                kept[-1][2].result()
            handle = service.submit(prompt, **options)
            if generator.random() < 0.1:
                handle.cancel()
            kept.append((prompt, options, handle))
            if number % 1000 == 999:
                sizes.append(psutil.Process().memory_info().rss)
                handle.result()  # the last one in the queue: there is room for what follows
                for prompt, options, handle in kept[::100]:
                    if handle.result().finish_reason != "cancelled":
                        assert service.submit(prompt, **options).result().token_ids == handle.result().token_ids
                del kept[:]
        service.generate(prompts[:1], max_new_tokens=1)
        assert service.num_open == 0
    assert sizes[-1] < sizes[4] * 1.05, "memory must not grow with the number of requests"
