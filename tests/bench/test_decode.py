from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loci.bench import decode
from loci.bench.decode import DecodeConfig, Prompt, Run, ratio, run
from loci.errors import BadInput, DataNotFound, UnknownName
from loci.lm.engine.hf import HFEngine
from loci.lm.generate import generate
from loci.lm.model import LanguageModel


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"question_id": 1, "task": "multi_turn", "category": "writing", "turns": ["abc abc", "again"]},
        {"question_id": 2, "task": "qa", "category": "qa", "turns": ["xyz xyz xyz"]},
    ]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


QUICK = DecodeConfig(drafters=("lookup", "recycle"), engines=("hf",), max_new_tokens=12, timings=False)


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["rows"]}


def test_every_drafter_stands_beside_plain_decoding_on_its_engine(tiny_model: LanguageModel, questions: Path) -> None:
    found = run(tiny_model, questions, config=QUICK).as_json()
    assert [(row["name"], row["engine"]) for row in found["rows"]] == [
        ("plain", "hf"), ("lookup", "hf"), ("recycle", "hf"),
    ]  # fmt: skip
    rows = rows_of(found)
    assert rows["plain"]["tokens_per_step"] == 1
    assert rows["plain"]["ratio_to_plain"] == 1
    for name in ("lookup", "recycle"):
        row = rows[name]
        assert row["tokens_per_step"] >= 1
        assert row["identical"] == 1
        assert row["exact"] is True
        assert row["bytes"] > 0
        low, high = row["ratio_to_plain_interval"]
        assert low <= row["ratio_to_plain"] <= high
        assert row["new_tokens"] == rows["plain"]["new_tokens"]
        assert set(row["tasks"]) == {"multi_turn", "qa"}
        assert row["tasks"]["multi_turn"]["prompts"] == 2
    assert found["complete"] is True
    assert {"seed", "data", "machine", "model", "config"} <= set(found["recipe"])
    json.dumps(found)


def test_a_second_turn_has_the_plain_answer_as_its_history(tiny_model: LanguageModel, questions: Path) -> None:
    result = run(tiny_model, questions, config=QUICK)
    first, second = (prompt for prompt in result.prompts if prompt.task == "multi_turn")
    answer = tiny_model.decode(result.arms[0].runs[0].tokens)
    text = tiny_model.decode(second.tokens)
    assert text.startswith(tiny_model.decode(first.tokens)[: -len("assistant:")])
    assert answer in text


def test_all_arms_read_the_same_prompts_and_begin_in_turn(
    tiny_model: LanguageModel, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Prompt]] = []
    true = decode._Ours.run

    def spy(self: Any, prompt: Prompt, max_new_tokens: int) -> Run:
        seen.append((self.name, prompt))
        return true(self, prompt, max_new_tokens)

    monkeypatch.setattr(decode._Ours, "run", spy)
    run(tiny_model, questions, config=QUICK)
    for start in range(0, len(seen), 3):
        assert len({prompt.tokens for _, prompt in seen[start : start + 3]}) == 1
    assert [name for name, _ in seen[::3]] == ["plain", "lookup", "recycle"]


def test_an_interrupted_run_keeps_what_was_measured(
    tiny_model: LanguageModel, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = decode._Ours.run, [0]

    def stopping(self: Any, prompt: Prompt, max_new_tokens: int) -> Run:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return true(self, prompt, max_new_tokens)

    monkeypatch.setattr(decode._Ours, "run", stopping)
    result = run(tiny_model, questions, config=QUICK)
    assert result.complete is False
    assert {row["prompts"] for row in result.as_json()["rows"]} == {1}


def test_where_a_text_differs_first_the_gap_of_the_plain_run_is_told(tiny_model: LanguageModel) -> None:
    prompt = Prompt(task="qa", tokens=tuple(tiny_model.encode("abc")))
    plain = generate(tiny_model, list(prompt.tokens), max_new_tokens=5, engine="hf").tokens
    other = (*plain[:3], (plain[3] + 1) % tiny_model.vocabulary, *plain[4:])
    runs = [Run(tokens=tokens, seconds=1.0, prefill_seconds=0.0, steps=5) for tokens in (plain, other)]
    arms = [
        decode.ArmResult(name=name, engine="hf", kind=kind, plain="plain", runs=[one])
        for name, kind, one in zip(("plain", "odd"), ("plain", "drafter"), runs, strict=True)
    ]
    ours = decode._Ours(tiny_model, HFEngine(tiny_model), None, "plain", QUICK)
    decode._find_gaps(tiny_model, arms, [prompt], {"hf": ours})
    import torch

    with torch.inference_mode():
        logits = tiny_model.model(torch.tensor([[*prompt.tokens, *plain[:3]]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    assert arms[1].gaps == [pytest.approx(first - second, abs=1e-4)]
    assert arms[0].gaps == []


def test_peers_are_measured_in_the_same_run(tiny_model: LanguageModel, questions: Path, recwarn: object) -> None:
    config = DecodeConfig(
        drafters=(), engines=("hf",), peers=("transformers",), limit=1, max_new_tokens=6, timings=False
    )
    deep = _deep(tiny_model)
    rows = rows_of(run(deep, questions, config=config).as_json())
    names = ["transformers", "transformers lookup", "transformers assistant", "transformers early exit"]
    assert list(rows) == ["plain", *names]
    assert all(rows[name]["identical_to_first_plain"] == 1 for name in names)
    assert rows["transformers"]["tokens_per_step"] == 1
    assert rows["transformers assistant"]["bytes"] == 0  # it shares every weight


def _deep(model: LanguageModel) -> LanguageModel:
    """The tiny model with six layers, so that its first four are fewer."""
    import copy
    from dataclasses import replace

    import torch

    config = copy.deepcopy(model.model.config)
    config.num_hidden_layers = 6
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 6
    torch.manual_seed(1)
    made = type(model.model)(config).eval()
    made.generation_config = copy.deepcopy(model.model.generation_config)
    return replace(model, model=made)


def test_a_peer_that_cannot_run_is_left_out_with_the_reason(tiny_model: LanguageModel, questions: Path) -> None:
    config = DecodeConfig(drafters=(), engines=("hf",), peers=("llama.cpp",), limit=1, max_new_tokens=4, timings=False)
    result = run(tiny_model, questions, config=config)
    assert "GGUF" in result.skipped["llama.cpp"]
    assert [arm.name for arm in result.arms] == ["plain"]


def test_books_are_cut_to_the_context_that_is_asked_for(tiny_model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "tale.txt").write_text("It was a dark night. " * 200)
    config = DecodeConfig(drafters=(), engines=("hf",), context=240, limit=2, max_new_tokens=4, timings=False)
    result = run(tiny_model, tmp_path, config=config)
    assert [prompt.task for prompt in result.prompts] == ["tale", "tale"]
    assert all(200 < len(prompt.tokens) <= 240 for prompt in result.prompts)
    with pytest.raises(DataNotFound, match="no-such"):
        run(tiny_model, tmp_path / "no-such", config=config)
    with pytest.raises(BadInput, match="no room"):
        run(tiny_model, tmp_path, config=DecodeConfig(engines=("hf",), context=130, timings=False))


def test_timings_tell_steps_by_nodes_and_the_reading_of_a_prompt(tiny_model: LanguageModel, questions: Path) -> None:
    config = DecodeConfig(drafters=("lookup",), engines=("hf",), limit=1, max_new_tokens=4)
    found = run(tiny_model, questions, config=config).as_json()
    assert {1, 16, 32} <= set(found["step_ms"]["hf"][min(found["step_ms"]["hf"])])
    assert all(row["prefill_ms_2048"] > 0 for row in found["rows"])


def runs(tokens: Sequence[int], seconds: Sequence[float]) -> list[Run]:
    return [
        Run(tokens=(0,) * count, seconds=taken, prefill_seconds=0.0, steps=1)
        for count, taken in zip(tokens, seconds, strict=True)
    ]


def test_a_ratio_is_of_all_tokens_over_all_seconds_and_its_interval_holds_it() -> None:
    found = ratio(runs([10, 20], [1.0, 1.0]), runs([10, 20], [2.0, 4.0]))
    assert found["ratio"] == pytest.approx(3.0)
    assert found["interval"][0] == pytest.approx(2.0)
    assert found["interval"][1] == pytest.approx(4.0)
    assert ratio([], [])["ratio"] is None
    random = np.random.default_rng(0)
    same = [float(taken) for taken in random.uniform(1, 2, 30)]
    sure = ratio(runs([10] * 30, same), runs([10] * 30, [2 * taken for taken in same]))
    assert sure["interval"] == [pytest.approx(2.0), pytest.approx(2.0)]


@pytest.mark.parametrize(
    ("config", "near"),
    [
        (DecodeConfig(drafters=("lokup",), engines=("hf",)), "'lookup'"),
        (DecodeConfig(engines=("hff",)), "'hf'"),
        (DecodeConfig(engines=("hf",), peers=("lama.cpp",)), r"'llama\.cpp'"),
    ],
)
def test_unknown_names_are_answered_with_their_neighbours(
    config: DecodeConfig, near: str, tiny_model: LanguageModel, questions: Path
) -> None:
    with pytest.raises(UnknownName, match=near):
        run(tiny_model, questions, config=config)


def test_a_models_name_leads_to_its_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    assert decode.gguf_of(str(tmp_path)) == tmp_path / "small.gguf"
    assert decode.gguf_of(str(tmp_path / "small.gguf")) == tmp_path / "small.gguf"
    assert decode.gguf_of("owner/model") is None
