"""Whatever may stand in a message, a history or an event: none of it stops the worker, or those who read after it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workplace import Site
from workshop import make_worker

import send_job
from comfy_utils import (
    InvalidMessageError,
    InvalidWorkflowError,
    Job,
    NothingToRunError,
    is_job_id,
    printable,
)
from ground.answers import error_of, outputs_of, well_formed_entry, well_formed_node_errors
from ground.comfyui import ComfyUI, Finished, WorkflowRefusedError, _job_of_event, _Watch
from ground.messages import parse_message, parse_workflow_file
from ground.savers import own_outputs
from operate.report_page import draw_report
from worker.comfy_care import ran_s, started_at
from worker.errors import PutBackError
from worker.inputs import use_inputs
from worker.progress import Progress
from worker.results import Ran

MESSAGE_ID, JOB_ID = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
EXAMPLES = 60

texts = st.text(st.characters(), max_size=20)  # with halves of characters
odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 7, 1.5, "", float("inf"), float("nan"), "\ud800", 10**400, JOB_ID, [], {}]
)
leaves = odd | texts | st.floats()
values = st.recursive(
    leaves, lambda below: st.lists(below, max_size=3) | st.dictionaries(texts, below, max_size=3), max_leaves=5
)
ABSENT = object()


def objects(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with these keys: mostly with what belongs there, now and then with anything or without."""
    each = {
        key.replace("__", "-"): st.one_of(right, right, right, values, st.just(ABSENT)) for key, right in keys.items()
    }
    made = st.fixed_dictionaries(each)
    return made.map(lambda value: {key: item for key, item in value.items() if item is not ABSENT})


def are(
    request: pytest.FixtureRequest,
    strategy: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    examples: int = EXAMPLES,
) -> None:
    """Check examples: the same in each run, but with --full many others."""
    full = request.config.option.full
    bounds = settings(
        max_examples=examples * 20 if full else examples, derandomize=not full, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @bounds
    @given(strategy)
    def each(value: Any) -> None:
        check(value)

    each()


def is_writable(value: object) -> bool:
    """Whether it is strict JSON that UTF-8 can write."""
    return bool(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())


# --- Messages --------------------------------------------------------------------------------------------

titles = st.none() | texts | objects(title=texts)
nodes = st.builds(
    lambda class_type, more: {**more, "class_type": class_type},
    st.sampled_from(["SaveImage", "KSampler"]) | texts,
    objects(
        inputs=st.dictionaries(texts | st.just("filename_prefix"), values, max_size=3),
        _meta=titles,
        is_changed=values,
    ),
)
workflows = st.dictionaries(texts, nodes, min_size=1, max_size=3)
jobs = objects(
    prompt=workflows, exec_cmd=texts, job_id=st.just(JOB_ID), prompt_id=st.just(JOB_ID), inputs=values, extra_data=values,
    callback_url=st.just("https://x/"), workflow_key=texts, retry_of=texts, number=values,
)  # fmt: skip
files = objects(bucket=objects(name=texts), object=objects(key=texts | st.just("input/jobs/x.json"), sequencer=texts))
inner = values | workflows | jobs | objects(input=objects(workflow=workflows)) | st.builds(json.dumps, workflows)
messages = (
    inner
    | objects(Type=st.just("Notification"), TopicArn=texts, MessageId=texts, Message=st.builds(json.dumps, inner))
    | objects(
        Records=st.lists(objects(eventName=st.just("ObjectCreated:Put"), eventTime=texts, s3=files), max_size=2)
    )
    | objects(
        source=st.just("aws.s3") | texts,
        detail__type=st.just("Object Created") | texts,
        id=texts,
        detail=files | inner,
    )
    | objects(prompt=jobs)
)


def check_message(message: Any) -> None:
    for body in (json.dumps(message), json.dumps(message)[:-1], message if isinstance(message, str) else ""):
        try:
            job = parse_message(body, MESSAGE_ID)
        except NothingToRunError:
            continue
        except InvalidMessageError as error:
            check_refusal(error)
            continue
        assert is_job_id(job.id)
        assert len(job.warnings) < 15
        assert is_writable(
            [list(job.warnings), dict(job.inputs), dict(job.extra_data), job.callback_url, job.command]
        )
        if job.workflow is not None:
            check_workflow(job.workflow)


def check_refusal(error: InvalidMessageError) -> None:
    assert error.job_id is None or is_job_id(error.job_id)
    assert len(str(error)) < 400


def check_workflow(workflow: Any) -> None:
    """What becomes of a workflow before, while and after it is sent."""
    assert is_writable(workflow)
    try:
        owned = own_outputs(workflow, JOB_ID)
        owned = use_inputs(owned, {})
    except InvalidWorkflowError:
        return
    assert is_writable(owned)
    for node_id in workflow:
        progress = Progress(owned, JOB_ID, "i-1")
        progress.note({"type": "progress", "data": {"node": node_id, "value": 1, "max": 2}})
        check_news(progress)
    send_job.fresh_seeds(workflow, set())


def check_news(progress: Progress) -> None:
    news: Any = progress.news()
    if news is not None:
        json.dumps(news, allow_nan=False)
        assert printable(send_job.tell_progress(news)).isprintable()


def test_workflows(request: pytest.FixtureRequest) -> None:
    are(request, workflows, check_message)


def test_messages(request: pytest.FixtureRequest) -> None:
    are(request, messages, check_message)


def test_files_in_the_bucket(request: pytest.FixtureRequest) -> None:
    def check(value: Any) -> None:
        try:
            job, warnings = parse_workflow_file(value, Job(JOB_ID))
        except InvalidWorkflowError:
            return
        assert is_writable([job.workflow, dict(job.extra_data), list(warnings)])

    are(request, messages, check)


# --- What ComfyUI says -----------------------------------------------------------------------------------

moments = st.integers(0, 10**14) | st.just(10**30)
endings = st.sampled_from(["execution_start", "execution_success", "execution_error", "execution_interrupted"])
errors = objects(node_id=texts, node_type=texts, exception_type=st.just("torch.OutOfMemoryError") | texts,
                 exception_message=texts, traceback=st.lists(texts, max_size=2), timestamp=moments)  # fmt: skip
named = objects(filename=texts | st.just("x.png"), subfolder=texts, type=st.sampled_from(["output", "temp", "input"]))
shown = st.dictionaries(
    texts | st.sampled_from(["images", "text", "animated"]), st.lists(named | values, max_size=3), max_size=2
)
messages_of_a_run = st.tuples(endings, errors) | st.tuples(endings | texts, errors | values) | values
histories = objects(
    prompt=st.lists(values, max_size=2),
    outputs=st.dictionaries(texts, shown | values, max_size=2),
    status=objects(
        status_str=st.sampled_from(["success", "error"]),
        messages=st.lists(messages_of_a_run, max_size=3),
    ),
)
reasons = objects(
    type=st.just("value_not_in_list") | texts,
    message=texts,
    details=texts,
    extra_info=objects(input_name=texts, input_config=st.lists(values, max_size=2), received_value=values),
)
node_errors = st.dictionaries(
    texts, objects(class_type=texts, errors=st.lists(reasons | values, max_size=2)), max_size=2
)
refusals = objects(error=objects(type=texts, message=texts, details=texts) | texts, node_errors=node_errors)


def check_history(history: Any) -> None:
    """What is read from an entry as it was said, and taken into the form that it should have."""
    history = json.loads(json.dumps(history))
    if isinstance(history, dict):
        entry = well_formed_entry(history)
        ran_s(entry)
        started_at(entry)
        json.dumps([error_of(entry), entry["prompt"][0]])
        outputs_of(entry)


def test_histories(request: pytest.FixtureRequest) -> None:
    are(request, histories, check_history, 200)
    status = objects(status_str=st.just("error"), messages=st.lists(messages_of_a_run, min_size=1, max_size=2))
    are(request, st.fixed_dictionaries({"status": status}), check_history, 200)


def test_histories_and_what_comes_of_them(
    request: pytest.FixtureRequest, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt, what is told of it, and the report's page."""
    worker = make_worker(make_site(), monkeypatch)
    lease: Any = types.SimpleNamespace(attempt=1, sent_at=datetime.now(UTC) - timedelta(seconds=3))

    def check(said: tuple[Any, Any, Any]) -> None:
        history, node_errors, event = json.loads(json.dumps(said))
        if not isinstance(history, dict):
            return
        entry = well_formed_entry(history)
        ran_s(entry)
        started = started_at(entry) or datetime.now(UTC)
        finished = Finished(entry, well_formed_node_errors(node_errors), None if event is None else str(event))
        try:
            result: Any = worker.results.make(Job(JOB_ID), Ran(started, finished, error=error_of(entry)), lease)
        except PutBackError:  # a temp file that ComfyUI would make again
            return
        result = json.loads(json.dumps(result))
        assert result["status"] in ("succeeded", "failed")
        assert printable(send_job.tell_result(result)).isprintable()
        assert draw_report("x", [result], {}, {}).endswith("</html>\n")

    are(request, st.tuples(histories, values | st.dictionaries(texts, values, max_size=2), values), check, 30)


def test_refusals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy = ComfyUI("127.0.0.1:9")

    def check(answer: Any) -> None:
        said = types.SimpleNamespace(status_code=400, json=lambda: json.loads(json.dumps(answer)), text="x")
        monkeypatch.setattr(comfy, "_call", lambda *_, **__: said)
        with pytest.raises(WorkflowRefusedError) as refused:
            comfy._submit({}, JOB_ID, "x", {"key": "a secret of some length"})
        assert refused.value.error["message"]
        json.dumps(refused.value.error)

    are(request, refusals | values, check, 200)
    are(request, st.fixed_dictionaries({"node_errors": node_errors}), check, 200)


steps = objects(node=texts | st.just("1"), value=st.floats() | st.integers(), max=st.integers(), prompt_id=st.just(JOB_ID),
                nodes=st.dictionaries(texts, objects(state=st.just("finished")), max_size=3))  # fmt: skip
events = objects(
    type=st.sampled_from(["executing", "progress", "progress_state", "execution_error", "execution_success"]),
    data=steps,
)


def test_events(request: pytest.FixtureRequest) -> None:
    def check(event: Any) -> None:
        event = json.loads(json.dumps(event))
        progress = Progress({"1": {"class_type": "X", "_meta": None}, "2": {"class_type": "Y"}}, JOB_ID, "i-1")
        watch = _Watch(JOB_ID, 60, 60, progress.note, lambda: False, lambda: False)
        if {JOB_ID: watch}.get(_job_of_event(event)):
            watch._take(event)
            check_news(progress)

    are(request, events | values, check, 200)
    ours = steps.map(lambda data: {**data, "prompt_id": JOB_ID})
    kinds = st.sampled_from(["executing", "progress", "progress_state", "execution_error"])
    are(request, st.fixed_dictionaries({"type": kinds, "data": ours}), check, 200)


def test_words(request: pytest.FixtureRequest) -> None:
    def check(text: str) -> None:
        shown = printable(text, 50)
        assert shown.isprintable()
        assert len(shown) < 100

    are(request, st.text(st.characters() | st.sampled_from("\x1b[]0;m\x07\\\x9b")), check)


# --- What they found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [None, "a title", 7, [], {}, {"title": None}, {"title": {"a": 1}}, {"title": ""}])
def test_a_node_is_told_by_its_class_where_the_editor_has_no_title_for_it(meta: object) -> None:
    progress = Progress({"1": {"class_type": "KSampler", "_meta": meta}}, JOB_ID, "i-1")
    progress.note({"type": "executing", "data": {"node": "1"}})
    assert (progress.news() or {})["node_title"] == "KSampler"
