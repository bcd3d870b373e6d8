"""What the attacks of Table 4 ask for, and how each way answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradprune.bench.table_text import ATTACKS, Bert, Search, Sentence, TextLengths, Victim
from gradprune.bench.table_training import epoch_seconds, predicted
from gradprune.bench.table_ways import COMPILED, FROZEN, SHIPPED, Entry

WORDS, SYNONYMS = 6, 3
LENGTHS = TextLengths(
    words=WORDS, synonyms=SYNONYMS, population=4, generations=2, candidates=5, iterations=7, characters=2, tries=9
)


class Unmoved:
    """Is never fooled, and notes what it is asked; ``"gradient"`` stands for a question for one."""

    def __init__(self) -> None:
        self.asked: list[int | str] = []

    def probabilities(self, sentences: list[Sentence]) -> Any:
        self.asked.append(len(sentences))
        unknown = np.array([(one < 1000).mean() for one in sentences])
        return np.stack([0.9 - 0.1 * unknown, 0.1 + 0.1 * unknown], 1)

    def gradient(self, sentence: Sentence, label: int) -> Any:
        self.asked.append("gradient")
        return np.ones((len(sentence), 4))

    def embedding(self, words: Sentence) -> Any:
        return np.ones((len(words), 4))


ASKED: dict[str, list[int | str]] = {
    "TextFooler": [1, WORDS, *[SYNONYMS] * WORDS],
    "PWWS": [WORDS + 1, *[SYNONYMS + 1] * WORDS, *[1] * WORDS],
    "Genetic": [*[SYNONYMS + 1] * 4, *[4, *[SYNONYMS + 1] * 3] * 2],
    "BERTAttack": [1, WORDS - 1, *[1] * 5 * (WORDS - 1)],
    "FD": [1, "gradient"] * 7,
    "DeepWordBug": [1] * (WORDS + 1),
    "VIPER": [1] * 9,
}
"""Sentences in each question, as OpenAttack's classes ask them of a network that is never fooled."""


@pytest.mark.parametrize("name", ATTACKS)
def test_questions_are_those_of_open_attack(name: str) -> None:
    victim, sentence = Unmoved(), np.arange(2000, 2000 + WORDS)
    found = ATTACKS[name][0](Search(victim, sentence, 0, LENGTHS, np.random.RandomState(0)))  # type: ignore[arg-type]
    assert found.shape == sentence.shape
    if name == "SememePSO":  # which asks no sentence twice
        assert set(victim.asked) == {1}
        assert 4 <= len(victim.asked) <= 4 * 2 * 2
    else:
        assert victim.asked == ASKED[name]


def test_all_ways_answer_alike_and_only_as_shipped_weights_have_gradients() -> None:
    torch.manual_seed(0)
    model = Bert(1, 64, WORDS)
    sentences = [np.arange(start, start + WORDS) for start in range(1000, 1000 + 11)]
    answers, gradients, left = {}, {}, {}
    for way in (SHIPPED, FROZEN, COMPILED):
        model.requires_grad_(way == SHIPPED).zero_grad()
        asked: list[tuple[int, bool]] = []

        def encoder(
            embedded: torch.Tensor, asked: list[tuple[int, bool]] = asked, encoder: Any = model.encoder
        ) -> torch.Tensor:
            asked.append((len(embedded), torch.is_grad_enabled()))
            return encoder(embedded)  # type: ignore[no-any-return]

        victim = Victim(model, encoder, way, "cpu")
        answers[way] = victim.probabilities(sentences)
        assert asked == [(8, way != COMPILED), (3, way != COMPILED)]
        left[way] = {name for name, value in model.named_parameters() if value.grad is not None}
        gradients[way] = victim.gradient(sentences[0], 1)
    assert left == {SHIPPED: {name for name, _ in model.named_parameters()}, FROZEN: set(), COMPILED: set()}
    for way in (FROZEN, COMPILED):
        np.testing.assert_allclose(answers[way], answers[SHIPPED], atol=1e-6)
        np.testing.assert_allclose(gradients[way], gradients[SHIPPED], rtol=1e-3, atol=1e-9)
    assert np.abs(gradients[SHIPPED]).max() > 0
    assert answers[SHIPPED].argmax(1).tolist() == [0] * 11


def test_an_epoch_has_fifty_thousand_images() -> None:
    entry = Entry("figure2", "resnet18-32-b16", "K = 1", SHIPPED, samples=16)
    assert epoch_seconds(entry, 2.0) == 2.0 * 50_000 / 16
    assert [predicted(steps) for steps in (1, 3)] == [1.2, pytest.approx(4 / 3)]
