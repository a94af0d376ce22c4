"""What a run folder says of itself, whatever its files hold."""

import json
import logging
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.errors import UserError
from scaling.run import config as run_config
from scaling.run.build import described_run
from scaling.run.folder import read_description, read_evaluations, read_events, read_status
from scaling.study import sweep

KEYS = (
    "config", "data", "cost", "status", "step", "steps", "saved", "heartbeat", "helpers", "imported", "set",
    "model", "name", "runs", "metric", "event", "values", "wall", "evaluators", "optimizer", "param_rules",
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["vit", "done", "diffusion", ""])
)
JSON = st.recursive(
    SCALARS | st.text(string.printable, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=20,
)
FILES = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode())


def event(step: int, **more: Any) -> bytes:
    line = {"event": "evaluate", "step": step, "evaluator": "val", "values": {"val_loss": 1.0}, "wall": 1.0}
    return json.dumps(line | more).encode()


def test_a_bad_line_loses_itself_alone_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [
        b"{",
        b"\xff",
        b"3",
        event(-1),
        event(2, values=[1]),
        event(2, wall="x"),
        event(2, values={"a": None}),
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([event(1), *bad, event(3), b'{"torn']))
    with caplog.at_level(logging.WARNING):
        assert [line["step"] for line in read_events(tmp_path)] == [1, 3]
        assert [line["step"] for line in read_events(tmp_path)] == [1, 3]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "7 of 9 lines are no events, and are left out: [2, 3, 4, 5, 6]"
    ]


def test_a_torn_last_line_is_not_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(event(1) + b"\n" + event(2)[:20])
    assert [line["step"] for line in read_events(tmp_path)] == [1] and not caplog.records


@given(FILES)
@settings(max_examples=150, deadline=None)
def test_files_of_a_run_or_a_study_are_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("config.json", "status.json", "study.json", "metrics.jsonl"):
            (folder / file).write_bytes(content)
        status = _read_or_refuse(read_status, folder)
        assert status is None or status["status"] in ("running", "interrupted", "done", "failed", "importing")
        described = _read_or_refuse(read_description, folder)
        assert described is None or isinstance(described["config"], dict)
        events = _read_or_refuse(read_events, folder) or []
        assert all(type(event["step"]) is int and isinstance(event["event"], str) for event in events)
        evaluations = _read_or_refuse(read_evaluations, folder) or {}
        assert set(evaluations) <= {event["step"] for event in events}
        study = _read_or_refuse(sweep.stored, folder)
        assert study is None or isinstance(study["runs"], dict)


CONFIG = {
    "model": {"name": "vit", "variant": "A/4"}, "objective": {"name": "classification"},
    "data": {"name": "digits"}, "optimizer": {}, "train": {},
}  # fmt: skip


@given(st.sampled_from([*CONFIG, "evaluators", "helpers", "mesh"]), st.sampled_from(KEYS), JSON)
@settings(max_examples=150, deadline=None)
def test_a_stored_config_is_read_or_refused(section: str, key: str, value: Any) -> None:
    changed: dict[str, Any] = {**CONFIG, section: {**CONFIG.get(section, {}), key: value}}
    read = _read_or_refuse(
        lambda config: run_config.from_dict(run_config.stored({"config": config})), changed
    )
    assert read is None or read.model.name == CONFIG["model"]["name"] or section == "model"
    stored = _read_or_refuse(lambda config: run_config.stored({"config": config}), {**CONFIG, section: value})
    assert stored is None or set(CONFIG) <= set(stored)


def _read_or_refuse(read: Any, given: Any) -> Any:
    try:
        return read(given)
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return None


def test_a_runs_config_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {**CONFIG, "train": {"seed": -1}}}))
    with pytest.raises(UserError, match=r"config\.json: train\.seed=-1"):
        described_run(tmp_path)
