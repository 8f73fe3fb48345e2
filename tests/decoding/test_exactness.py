"""What drafting promises, on the real model and Spec-Bench's questions: the same tokens, in fewer steps.

In float32 on the engine of `transformers`, where exactness is claimed. The short form runs with every test, the whole
one and the ablations are slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loci.bench import spec_bench
from loci.decoding import names
from loci.lm.chat import Message
from loci.lm.generate import generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Sampling

WARM = Sampling(temperature=0.8, top_p=0.9)
SPECS = ("lookup", "recycle", "auto:lookup+recycle")


def prompts(model: LanguageModel, data: Path, count: int) -> list[list[int]]:
    if not (data / "spec_bench").is_dir():
        pytest.skip(f"needs spec_bench in {data}")
    chosen = spec_bench.pick(spec_bench.read(data / "spec_bench"), count)
    return [model.encode([Message(role="user", content=question.turns[0])]) for question in chosen]


def steps_and_tokens(
    model: LanguageModel, spec: str, asked: list[list[int]], *, tokens: int, max_nodes: int = 16, engine: str = "hf"
) -> tuple[int, list[tuple[int, ...]]]:
    drafter = names.drafter(spec, model, alone=True)
    made = [
        generate(model, prompt, max_new_tokens=tokens, drafter=drafter, max_nodes=max_nodes, engine=engine)
        for prompt in asked
    ]
    return sum(one.stats.steps for one in made), [one.tokens for one in made]


def test_a_question_gets_the_same_answer_in_fewer_steps(default_model: LanguageModel, data: Path) -> None:
    asked = [prompt for prompt in prompts(default_model, data, 12) if len(prompt) < 150][:1]
    plain_steps, plain = steps_and_tokens(default_model, "none", asked, tokens=16)
    for spec in SPECS:
        steps, tokens = steps_and_tokens(default_model, spec, asked, tokens=16)
        assert tokens == plain
        assert steps <= plain_steps


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_sixty_questions_get_the_same_answers(default_model: LanguageModel, data: Path, sampling: Sampling) -> None:
    drafters = {spec: names.drafter(spec, default_model, alone=True) for spec in SPECS}
    for number, prompt in enumerate(prompts(default_model, data, 60)):
        plain = generate(default_model, prompt, max_new_tokens=64, sampling=sampling, seed=number, engine="hf")
        for spec, drafter in drafters.items():
            drafted = generate(
                default_model, prompt, max_new_tokens=64, sampling=sampling, seed=number, engine="hf", drafter=drafter
            )
            assert drafted.tokens == plain.tokens, f"{spec} on question {number}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_each_part_of_recycling_is_worth_its_steps(default_model: LanguageModel, data: Path) -> None:
    asked = prompts(default_model, data, 18)

    def tokens_per_step(variant: str) -> float:
        spec = f"recycle:cold,{variant}" if variant not in ("warm,frozen", "random") else f"recycle:{variant}"
        steps, tokens = steps_and_tokens(default_model, spec, asked, tokens=80, engine="auto")
        return sum(map(len, tokens)) / steps

    whole = tokens_per_step("15")
    assert whole >= 1.6
    assert tokens_per_step("accepted") <= 0.95 * whole
    assert tokens_per_step("chain") <= 0.88 * whole
    assert tokens_per_step("no-prompt") <= 0.92 * whole
    assert tokens_per_step("warm,frozen") < whole
    assert tokens_per_step("random") <= 1.05
