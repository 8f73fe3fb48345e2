"""Topics: bounded in number, named by what their notes share, kept and forgotten exactly."""

import numpy as np
import pytest

from loci.errors import StoreError
from loci.text.topics import TopicClusters, TopicRow

THEMES = {
    "otters": ["The sea otters ate clams.", "Otters hold hands while they sleep.", "An otter pup learned to swim."],
    "bread": ["The bread dough rose.", "Sourdough bread needs a starter.", "I baked bread with rye."],
    "taxes": ["The tax office wrote.", "Tax forms are due in May.", "My tax refund came."],
}


def grown(embedder) -> TopicClusters:
    topics = TopicClusters()
    for _ in range(4):
        for lines in THEMES.values():
            for line, vector in zip(lines, embedder.embed(lines), strict=True):
                topics.add(vector, line)
    return topics


def test_there_are_never_more_topics_than_the_root_of_the_notes(embedder):
    topics = grown(embedder)
    assert topics.notes == 36
    assert 1 < len(topics) <= 7


def test_a_note_is_tagged_with_the_words_of_its_theme(embedder):
    topics = grown(embedder)
    labels = [topics.label(topic).lower() for topic in topics.nearest(embedder.embed(["What do otters eat?"])[0])]
    assert any("otter" in label for label in labels)


def test_what_is_stored_row_by_row_comes_back_the_same(embedder):
    topics = grown(embedder)
    again = TopicClusters.from_rows(384, [topics.row(topic) for topic in range(len(topics))])
    vector = embedder.embed(["A loaf of bread"])[0]
    assert again.nearest(vector) == topics.nearest(vector)
    assert [again.label(i) for i in range(len(again))] == [topics.label(i) for i in range(len(topics))]
    assert again.add(vector, "A loaf of bread") == topics.add(vector, "A loaf of bread")


def test_dropped_terms_are_in_no_label_and_no_count(embedder):
    topics = grown(embedder)
    changed = topics.drop_terms({"otter", "bread"})
    assert changed
    for topic in range(len(topics)):
        row = topics.row(topic)
        assert "otter" not in row.label.lower()
        assert not {"otter", "bread"} & row.words.keys()


def test_a_row_of_another_width_is_refused():
    with pytest.raises(StoreError, match="loci notes reembed"):
        TopicClusters.from_rows(384, [TopicRow(size=1, total=np.zeros(8, dtype="<f4").tobytes(), label="x", words={})])
