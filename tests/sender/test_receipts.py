"""How receipts are looked for: how often, in which order, and through which errors."""

from __future__ import annotations

import itertools
import uuid
from collections import Counter

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ResponseStreamingError
from sender_tools import Bucket, client_error

import send_job


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


MANY = [str(uuid.UUID(int=number)) for number in range(1000)]


def test_the_list_of_ended_jobs_tells_of_many_at_the_cost_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {job_id: 1.0 + number for number, job_id in enumerate(MANY)})
    bucket.marked_at = dict(bucket.done_at)
    found = bucket.wait()
    assert max(moment - bucket.done_at[job_id] for moment, job_id in found) <= send_job.LONGEST_PAUSE_S
    minutes = bucket.now / 60
    looks_in_vain = len(bucket.asked) - len(MANY)
    assert looks_in_vain <= minutes * 60 / send_job.LONGEST_PAUSE_S * send_job.LOOKS_PER_ROUND + len(bucket.listed)
    assert len(bucket.listed) <= minutes * 60 / send_job.FIRST_PAUSE_S
    assert {job_id for _, job_id in found} == set(MANY)


@pytest.mark.parametrize(
    ("marked_s", "within_s"),
    [
        (2999.0, 5),
        (2941.0, 5),  # a worker's clock that is behind, or a mark that came late
        (None, 260),  # the worker was killed before it could: the job is found in its turn
        (3300.0, 5),  # a clock that is ahead
    ],
)
def test_what_the_list_says_late_or_not_at_all_is_found(
    monkeypatch: pytest.MonkeyPatch, marked_s: float | None, within_s: float
) -> None:
    odd, *others = MANY
    bucket = Bucket(monkeypatch, {odd: 3000.0} | dict.fromkeys(others[:600], 9000.0))
    ended_before = {str(uuid.UUID(int=10_000 + number)): 2990.0 for number in range(3)}
    ended_long_before = {str(uuid.UUID(int=20_000 + number)): -4000.0 for number in range(1500)}
    bucket.marked_at = ended_before | ended_long_before | ({} if marked_s is None else {odd: marked_s})
    found: list[tuple[float, str]] = []
    for result in send_job.wait_for(bucket, "bucket", bucket.done_at):
        found.append((bucket.now, result["job_id"]))
        break
    assert found[0][1] == odd
    assert 0 <= found[0][0] - 3000 <= within_s


def test_a_clock_that_is_ahead_hides_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, then, *others = MANY
    bucket = Bucket(monkeypatch, {ahead: 100.0, then: 200.0} | dict.fromkeys(others, 5000.0))
    bucket.marked_at = {ahead: 1900.0, then: 200.0}
    found = [
        (bucket.now, result["job_id"])
        for result, _ in zip(send_job.wait_for(bucket, "bucket", bucket.done_at), "12", strict=False)
    ]
    assert [job_id for _, job_id in found] == [ahead, then]
    assert found[1][0] <= 205


def test_what_had_ended_before_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, dict.fromkeys(MANY, -1000.0))
    bucket.marked_at = dict(bucket.done_at) | {str(uuid.UUID(int=10_000 + n)): -2000.0 for n in range(1500)}
    assert {moment for moment, _ in bucket.wait()} == {0.0}
    assert len(bucket.listed) == 3, "pages of a thousand"


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
