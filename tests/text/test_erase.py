"""Chains of versions without a cause: what rules made is made again, what a model saw goes."""

from loci.text.erase import RULES, without


def version(number: int, context: str, *, cause: int | None = None, made_by: str = RULES, keywords=("a",)):
    return {
        "version": number,
        "keywords": list(keywords),
        "tags": [],
        "context": context,
        "cause": cause,
        "made_by": made_by,
    }


def test_without_causes_a_chain_is_the_same():
    chain = [version(1, "x"), version(2, "x; y", cause=5)]
    assert without(chain, {9}) == chain


def test_a_later_rule_is_applied_to_what_is_left():
    chain = [
        version(1, "x"),
        version(2, "x; secret", cause=5),
        version(3, "x; secret; z", cause=6, keywords=("a", "b")),
    ]
    kept = without(chain, {5})
    assert [row["context"] for row in kept] == ["x", "x; z"]
    assert kept[-1]["keywords"] == ["a", "b"]


def test_a_model_that_saw_the_words_is_not_trusted_with_its_rewrite():
    chain = [version(1, "x"), version(2, "x; secret", cause=5), version(3, "about the secret", made_by="gpt", cause=6)]
    assert [row["context"] for row in without(chain, {5})] == ["x"]


def test_a_model_that_came_before_stays():
    chain = [version(1, "x"), version(2, "better x", made_by="gpt"), version(3, "better x; secret", cause=5)]
    assert [row["context"] for row in without(chain, {5})] == ["x", "better x"]
