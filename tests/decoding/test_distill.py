from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding import distill  # noqa: E402
from loci.decoding.distill import (  # noqa: E402
    DistilledText,
    Frames,
    circles,
    load_texts,
    read_instructions,
    save_texts,
    self_distill,
    teacher_pass,
)
from loci.errors import BadInput, DataNotFound, Unsupported  # noqa: E402

PROMPTS = ["count", "name it", "why?"]


def written_by(model, **options):
    arguments = {"tokens": 60, "answer_tokens": 12, "batch": 2, "user_turns": 1, "engine": "hf", "progress": False}
    return self_distill(model, PROMPTS, **{**arguments, **options})


@pytest.fixture(scope="module")
def texts(tiny_model) -> list[DistilledText]:
    return written_by(tiny_model)


def same(first: list[DistilledText], second: list[DistilledText]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.written, other.written)
        and one.temperature == other.temperature
        for one, other in zip(first, second, strict=True)
    )


def test_instructions_fall_into_training_and_calibration(data):
    training, calibration = read_instructions(data / "instructions")
    assert (len(training), len(calibration)) == (385, 42)
    assert not set(training) & set(calibration)


def test_every_tenth_record_is_for_calibration(tmp_path):
    rows = [json.dumps({"instruction": f"do {n}", "input": "it" if n == 9 else ""}) for n in range(20)]
    (tmp_path / "instructions.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    training, calibration = read_instructions(tmp_path)
    assert calibration == ["do 9\n\nit", "do 19"]
    assert training[:2] == ["do 0", "do 1"]


def test_absent_instructions_are_named(tmp_path):
    with pytest.raises(DataNotFound, match="LOCI_DATA"):
        read_instructions(tmp_path)


def test_the_budget_of_written_tokens_is_reached(texts):
    assert sum(int(text.written.sum()) for text in texts) >= 60
    assert {text.temperature for text in texts} <= {0.0, 0.7, 1.0}
    assert all(text.written[-1] and not text.written[0] for text in texts)


def test_greedy_answers_are_what_the_model_would_say(tiny_model):
    for text in written_by(tiny_model, temperatures=(0.0,), openings=False):
        with torch.inference_mode():
            best = tiny_model.model(torch.from_numpy(text.tokens).long()[None]).logits[0].argmax(dim=-1).numpy()
        where = np.flatnonzero(text.written[1:])
        assert best[where].tolist() == text.tokens[where + 1].tolist()


def test_the_same_seed_writes_the_same_texts_and_another_one_others(tiny_model, texts):
    assert same(written_by(tiny_model), texts)
    assert not same(written_by(tiny_model, seed=1), texts)


def test_an_interrupted_run_ends_like_one_in_one_piece(tiny_model, texts, tmp_path):
    written_by(tiny_model, folder=tmp_path, minutes=0.0)  # one round
    part = load_texts(tmp_path)
    assert 0 < len(part) < len(texts)
    whole = written_by(tiny_model, folder=tmp_path)
    assert same(whole, texts)
    assert same(load_texts(tmp_path), texts)
    told = distill.described(tmp_path)
    assert told["work"]["answered"] == sum(told["written"].values())


def test_work_with_other_arguments_is_not_taken_up(tiny_model, tmp_path):
    written_by(tiny_model, folder=tmp_path, minutes=0.0)
    with pytest.raises(BadInput, match="seed"):
        written_by(tiny_model, folder=tmp_path, seed=5)


def test_without_openings_it_ends_with_the_prompts(tiny_model):
    texts = written_by(tiny_model, tokens=10_000, temperatures=(0.0,), openings=False, user_turns=0)
    assert len(texts) <= len(PROMPTS)


def test_texts_come_back_as_they_were_saved(tmp_path):
    texts = [
        DistilledText(tokens=np.arange(size, dtype=np.int32), written=np.arange(size) % 2 == 0, temperature=temperature)
        for size, temperature in ((3, 0.0), (1, 0.7), (8, 1.0))
    ]
    save_texts(tmp_path, texts, about={"seed": 3})
    assert same(load_texts(tmp_path), texts)
    assert distill.described(tmp_path) == {
        "seed": 3, "texts": 3, "tokens": 12, "written": {"0.0": 2, "0.7": 1, "1.0": 4},
    }  # fmt: skip
    with pytest.raises(DataNotFound, match="distill"):
        load_texts(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("tokens", "round"),
    [
        (list(range(200)), False),
        ([1, 2, 3] * 40, True),
        (list(range(150)) + [7, 8] * 60, True),
        ([1, 2, 3] * 5, False),  # too short to tell
        (list(range(40)) * 2, False),  # said twice
        (list(range(10)) * 12, True),
    ],
)
def test_texts_that_go_round_in_circles_are_seen(tokens, round):
    assert circles(tokens) is round


def test_frames_are_read_off_the_template(default_model):
    frames = Frames.of(default_model)
    decode = default_model.tokenizer.decode
    assert decode(list(frames.opening)).endswith("<|im_start|>user\n")
    assert decode(list(frames.to_answer)) == "<|im_end|>\n<|im_start|>assistant\n"
    assert decode(list(frames.after_answer)) == "\n<|im_start|>user\n"
    assert decode(list(frames.cut_answer)) == "<|im_end|>\n<|im_start|>user\n"


def test_a_model_without_a_template_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", None)
    with pytest.raises(Unsupported, match="chat template"):
        written_by(tiny_model)


def test_numbers_that_make_no_text_are_refused(tiny_model):
    with pytest.raises(BadInput, match="tokens is 0"):
        written_by(tiny_model, tokens=0)
    with pytest.raises(BadInput, match="temperature"):
        written_by(tiny_model, temperatures=())


def test_the_teacher_keeps_what_the_model_computes(tiny_model, texts, tmp_path):
    found = teacher_pass(tiny_model, texts, tmp_path, top=8, batch_tokens=128, progress=False)
    assert found.hidden.dtype == torch.bfloat16
    for number in (0, len(texts) - 1):
        place = slice(int(found.starts[number]), int(found.starts[number + 1]))
        assert found.tokens[place].tolist() == texts[number].tokens.tolist()
        ids = torch.from_numpy(texts[number].tokens).long()[None]
        with torch.inference_mode():
            hidden = tiny_model.model.base_model(ids).last_hidden_state[0]
            logprobs = tiny_model.model(ids).logits[0].log_softmax(dim=-1)
        torch.testing.assert_close(found.hidden[place].float(), hidden, atol=0.05, rtol=0.02)
        kept = logprobs.gather(1, torch.from_numpy(found.top_ids[place].copy()).long())
        np.testing.assert_allclose(found.top_logprobs[place], kept, atol=0.25)
        together = np.exp(found.top_logprobs[place].astype(float)).sum(axis=1) + np.exp(found.rest[place].astype(float))
        np.testing.assert_allclose(together, 1.0, atol=0.01)


def test_the_teacher_does_nothing_twice(tiny_model, texts, tmp_path, monkeypatch):
    first = teacher_pass(tiny_model, texts, tmp_path, progress=False)
    monkeypatch.setattr(tiny_model.model.base_model, "forward", None)  # would fail if it ran
    again = teacher_pass(tiny_model, texts, tmp_path, progress=False)
    assert torch.equal(first.hidden, again.hidden)


def test_an_interrupted_teacher_goes_on(tiny_model, texts, tmp_path, monkeypatch):
    whole = teacher_pass(tiny_model, texts, tmp_path / "whole", batch_tokens=64, progress=False)
    body = tiny_model.model.base_model
    forward, calls = body.forward, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **options)

    monkeypatch.setattr(body, "forward", failing)
    monkeypatch.setattr(distill, "_SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        teacher_pass(tiny_model, texts, tmp_path / "half", batch_tokens=64, progress=False)
    monkeypatch.setattr(body, "forward", forward)
    found = teacher_pass(tiny_model, texts, tmp_path / "half", batch_tokens=64, progress=False)
    assert torch.equal(found.hidden, whole.hidden)


def test_no_texts_are_no_teacher(tiny_model, tmp_path):
    with pytest.raises(BadInput, match="no texts"):
        teacher_pass(tiny_model, [], tmp_path)
