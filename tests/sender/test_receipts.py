"""How receipts are looked for: how often, in which order, and through which errors."""

from __future__ import annotations

import io
import itertools
import json
import types
from collections import Counter
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ResponseStreamingError
from sender_tools import client_error, receipt

import send_job


class Bucket:
    """An S3 client with a clock of its own: each receipt appears at a second of it, errors come first."""

    class exceptions:  # noqa: N801
        NoSuchKey = KeyError

    def __init__(self, monkeypatch: pytest.MonkeyPatch, done_at: dict[str, float], *errors: Exception) -> None:
        self.now = 0.0
        self.done_at = done_at
        self.errors = list(errors)
        self.asked: list[tuple[float, str]] = []
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(send_job, "time", clock)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        assert Bucket == "bucket"
        job_id = Key.split("/")[1]
        self.asked.append((self.now, job_id))
        if self.errors:
            raise self.errors.pop(0)
        if self.now < self.done_at[job_id]:
            raise KeyError(Key)
        return {"Body": io.BytesIO(json.dumps(receipt(job_id)).encode())}

    def wait(self, **more: Any) -> list[tuple[float, str]]:
        """(when, which) of each receipt."""
        found = send_job.wait_for(self, "bucket", list(self.done_at), **more)
        return [(self.now, result["job_id"]) for result in found]


def test_receipts_come_as_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {"a": 9, "b": 0, "c": 9})
    found = bucket.wait()
    assert found[0] == (0, "b")
    assert sorted(job for _, job in found[1:]) == ["a", "c"]
    assert 9 <= found[1][0] <= 9 + send_job.LONGEST_PAUSE_S
    assert Counter(job for _, job in bucket.asked)["b"] == 1, "a finished job is not looked for again"


def test_looks_grow_rare_while_nothing_comes_and_frequent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {"a": 600, "b": 10_000})
    found = bucket.wait()
    moments = [moment for moment, job in bucket.asked if job == "b"]
    pauses = [later - sooner for sooner, later in itertools.pairwise(moments)]
    assert pauses[0] <= 1
    assert max(pauses) == send_job.LONGEST_PAUSE_S
    after = moments.index(found[0][0])
    assert pauses[after] == send_job.FIRST_PAUSE_S, "where one is done others will be soon"


def test_many_jobs_cost_no_more_looks_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {f"job{number}": 0.0 if number == 99 else 1000.0 for number in range(100)}
    bucket = Bucket(monkeypatch, jobs)
    found = bucket.wait()
    assert len(found) == 100
    assert max(Counter(moment for moment, _ in bucket.asked).values()) == send_job.LOOKS_PER_ROUND
    assert found[0][1] == "job99", "everyone has a turn"
    assert found[0][0] < 60


def test_after_the_time_limit_one_last_look_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bucket(monkeypatch, {"a": 7.0}).wait(timeout_s=7) == [(7, "a")]
    bucket = Bucket(monkeypatch, {"a": 7.1})
    with pytest.raises(send_job.WaitTimeoutError):
        bucket.wait(timeout_s=7)
    assert bucket.now == 7


@pytest.mark.parametrize(
    "error",
    [
        client_error(503, "SlowDown"),
        client_error(500, "InternalError"),
        client_error(400, "RequestTimeout"),
        client_error(400, "ThrottlingException"),
        EndpointConnectionError(endpoint_url="https://s3"),
        ResponseStreamingError(error="cut"),
    ],
    ids=str,
)
def test_what_passes_is_waited_through_and_said_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    said: list[str] = []
    bucket = Bucket(monkeypatch, {"a": 0, "b": 0}, error, error)
    assert sorted(job for _, job in bucket.wait(say=said.append)) == ["a", "b"]
    assert said == [f"Results cannot be read just now, waiting goes on: {error}"]
    assert [moment for moment, _ in bucket.asked[:3]] == [0, 0.75, 1.875], "one try a round"


@pytest.mark.parametrize(
    "error", [client_error(403, "AccessDenied"), client_error(404, "NoSuchBucket"), NoCredentialsError()], ids=str
)
def test_what_will_not_pass_ends_the_waiting(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        Bucket(monkeypatch, {"a": 0}, error).wait()
