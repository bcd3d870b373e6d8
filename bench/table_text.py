"""[SB] Table 4: what eight attacks of OpenAttack ask a BERT for, in five ways.

OpenAttack 2.1.1 needs packages and downloads (victims, synonyms, sentence encoders) that are gone, so its attacks are
driven from here: each issues the queries of the class of the same name with its defaults, in the same batches, and goes
on by what the network says. Words are random numbers, their synonyms too, and the network, of BERT's configuration, has
random weights and one class far ahead, so that no attack ends early. Sentence encoders and language models, which are
no part of the victim, are left out.

Note [Queries]
    OpenAttack's ``get_prob`` calls ``get_grad``: every question runs a backward pass over all weights, in batches of
    eight. That is what "as shipped" does here. "frozen" is the paper's way: parameters require no gradient, and
    backward passes end at the embeddings (were those frozen too, there would be nothing to keep the gradient of). A
    question for a probability needs no backward pass, and gets none where the network is compiled, by either compiler;
    only FD asks for gradients. Victims are no models, so what is patched is a function of the network that makes a
    victim of it and runs the attack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradprune

from .baselines import Contender
from .benchmark import already
from .cases import SEED, Case, Encoder, Workload
from .harness import Budget
from .store import Results, Settings
from .table_ways import FROZEN, PATCHED, SHIPPED, Entry, Models, compare, contender, sharing

PART = "4"
QUERY_BATCH = 8
VOCABULARY, FIRST_WORD = 30_522, 1000
"""Of BERT: how many words there are, and the first that is no special one."""

UNKNOWN = 100

CERTAIN = 10.0
"""What a class has ahead: nothing fools the network, so that every attack asks all it may ask, on any machine."""

Sentence = numpy.ndarray[Any, numpy.dtype[numpy.int64]]
"""Words ``(words,)``."""


@dataclass(frozen=True)
class TextLengths:
    """How long the attacks are; the defaults are those of OpenAttack where it has one.

    Attributes:
        layers: Of the network; BERT has twelve.
        hidden: Its width.
        words: In a sentence.
        synonyms: Of a word.
        population: Of Genetic and SememePSO.
        generations: Of the same.
        candidates: Of BERTAttack, for a word.
        iterations: Of FD.
        characters: Words that DeepWordBug changes.
        tries: Of VIPER.
    """

    layers: int = 12
    hidden: int = 768
    words: int = 20
    synonyms: int = 10
    population: int = 20
    generations: int = 20
    candidates: int = 36
    iterations: int = 100
    characters: int = 5
    tries: int = 120


class Bert(nn.Module):
    """BERT-base (Devlin et al. 2019) with a classifier of two classes: 109 million parameters with twelve layers."""

    def __init__(self, layers: int, hidden: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.encoder = Encoder(layers, hidden, hidden // 64, words)
        nn.init.normal_(self.embedding.weight, std=0.5)
        with torch.no_grad():
            self.encoder.classifier.bias.copy_(torch.tensor([CERTAIN, 0.0]))

    def forward(self, words: Tensor) -> Tensor:
        """Logits ``(N, 2)`` of words ``(N, words)``."""
        return self.encoder(self.embedding(words))  # type: ignore[no-any-return]


class Victim:
    """What an attack may ask. See Note [Queries].

    Args:
        model: A ``Bert``, whose embedding is used.
        encoder: What computes logits of embeddings: a part of ``model``, or what a compiler made of it.
        way: One of ``table_ways.WAYS``.
        device: Of the network.
    """

    def __init__(self, model: Bert, encoder: Callable[[Tensor], Tensor], way: str, device: str) -> None:
        self._model, self._encoder, self._device = model, encoder, device
        self._trains, self._backward = way == SHIPPED, way in (SHIPPED, FROZEN)

    def probabilities(self, sentences: list[Sentence]) -> Any:
        """Of both classes, for each sentence, ``(N, 2)``."""
        return numpy.concatenate([self._ask(part, [0] * len(part), self._backward)[0] for part in _parts(sentences)])

    def gradient(self, sentence: Sentence, label: int) -> Any:
        """Of the loss, by the embeddings of a sentence, ``(words, hidden)``."""
        return self._ask([sentence], [label], True)[1][0]

    def embedding(self, words: Sentence) -> Any:
        """The vectors of some words, ``(N, hidden)``."""
        return self._model.embedding.weight.detach()[torch.from_numpy(words)].cpu().numpy()

    def _ask(self, sentences: list[Sentence], labels: list[int], backward: bool) -> tuple[Any, Any]:
        words = torch.from_numpy(numpy.stack(sentences)).to(self._device)
        if not backward:
            with torch.no_grad():
                logits = self._encoder(self._model.embedding(words))
            return logits.softmax(-1).cpu().numpy(), None
        embedded = self._model.embedding(words)
        if self._trains:
            embedded.retain_grad()
        else:
            embedded = embedded.detach().requires_grad_(True)
        logits = self._encoder(embedded)
        (-F.cross_entropy(logits, torch.tensor(labels, device=self._device))).backward()
        return logits.detach().softmax(-1).cpu().numpy(), embedded.grad.cpu().numpy()


def _parts(sentences: list[Sentence]) -> list[list[Sentence]]:
    return [sentences[start : start + QUERY_BATCH] for start in range(0, len(sentences), QUERY_BATCH)]


@dataclass
class Search:
    """One sentence under attack.

    Attributes:
        victim: What is asked.
        sentence: The words.
        label: What the network reads in them.
        lengths: How long the attack is.
        random: Where its random numbers come from.
    """

    victim: Victim
    sentence: Sentence
    label: int
    lengths: TextLengths
    random: numpy.random.RandomState

    def score(self, sentences: list[Sentence]) -> Any:
        """The probability of the label, for each sentence."""
        return self.victim.probabilities(sentences)[:, self.label]

    def fools(self, sentence: Sentence) -> bool:
        """Whether the network reads another class in a sentence."""
        return bool(self.victim.probabilities([sentence])[0].argmax() != self.label)

    def synonyms(self, word: int, count: int | None = None) -> list[int]:
        """Words that may take the place of one, always the same."""
        drawn = numpy.random.RandomState(int(word)).randint(FIRST_WORD, VOCABULARY, count or self.lengths.synonyms)
        return [int(one) for one in drawn if one != word]

    def replaced(self, sentence: Sentence, place: int, word: int) -> Sentence:
        """A copy of a sentence with another word."""
        copied = sentence.copy()
        copied[place] = word
        return copied

    def without_each(self) -> list[Sentence]:
        """The sentence with each word made unknown in turn."""
        return [self.replaced(self.sentence, place, UNKNOWN) for place in range(len(self.sentence))]


def textfooler(search: Search) -> Sentence:
    """Jin et al. 2020: words in the order of their importance; of each all synonyms at once."""
    before = search.score([search.sentence])[0]
    order = numpy.argsort(search.score(search.without_each()))
    current = search.sentence
    for place in order:
        tried = [search.replaced(current, place, word) for word in search.synonyms(search.sentence[place])]
        scores = search.victim.probabilities(tried)
        other = scores.argmax(1) != search.label
        if other.any():
            current = tried[int(other.argmax())]
            if search.fools(current):
                return current
        elif scores[:, search.label].min() < before:
            current = tried[int(scores[:, search.label].argmin())]
    return current


def pwws(search: Search) -> Sentence:
    """Ren et al. 2019: importance times the best synonym's effect, then words one after the other."""
    scores = search.score([*search.without_each(), search.sentence])
    saliency = scores[-1] - scores[:-1]
    weights = numpy.exp(saliency - saliency.max())
    best, effects = [], []
    for place, word in enumerate(search.sentence):
        words = search.synonyms(word)
        own = search.score([*(search.replaced(search.sentence, place, one) for one in words), search.sentence])
        best.append(words[int(own[:-1].argmin())])
        effects.append(own[-1] - own[:-1].min())
    current = search.sentence
    for place in numpy.argsort(-weights * numpy.array(effects)):
        current = search.replaced(current, place, best[place])
        if search.fools(current):
            break
    return current


def _perturbed(search: Search, sentence: Sentence) -> Sentence:
    """The best synonym of one random word that is still as it was."""
    free = numpy.flatnonzero(sentence == search.sentence)
    place = int(search.random.choice(free if len(free) else len(sentence)))
    tried = [search.replaced(sentence, place, word) for word in search.synonyms(search.sentence[place])]
    scores = search.score([*tried, sentence])
    return tried[int(scores[:-1].argmin())] if scores[:-1].min() < scores[-1] else sentence


def genetic(search: Search) -> Sentence:
    """Alzantot et al. 2018: a population that is crossed and perturbed."""
    size = search.lengths.population
    population = [_perturbed(search, search.sentence) for _ in range(size)]
    elite = population[0]
    for _ in range(search.lengths.generations):
        scores = search.victim.probabilities(population)
        top = int(scores[:, search.label].argmin())
        elite = population[top]
        if scores[top].argmax() != search.label:
            break
        fitness = 1 - scores[:, search.label].astype(float)
        if not fitness.sum():
            break
        parents = search.random.choice(size, (size - 1, 2), p=fitness / fitness.sum())
        masks = search.random.uniform(size=(size - 1, len(elite))) < 0.5
        crossed = [numpy.where(mask, population[a], population[b]) for mask, (a, b) in zip(masks, parents, strict=True)]
        population = [elite, *(_perturbed(search, one) for one in crossed)]
    return elite


def sememe_pso(search: Search) -> Sentence:
    """Zang et al. 2020: a swarm that is drawn to its best places; each member is asked for by itself."""
    size, known = search.lengths.population, dict[bytes, Any]()

    def mutated(sentence: Sentence) -> Sentence:
        place = int(search.random.choice(len(sentence)))
        return search.replaced(sentence, place, int(search.random.choice(search.synonyms(search.sentence[place]))))

    def ask(swarm: list[Sentence]) -> Any:
        for one in swarm:
            if one.tobytes() not in known:
                known[one.tobytes()] = search.victim.probabilities([one])[0]
        return numpy.stack([known[one.tobytes()] for one in swarm])

    swarm = [mutated(search.sentence) for _ in range(size)]
    elite, elite_score = swarm[0], 2.0
    for turn in range(search.lengths.generations):
        pull = 0.8 - 0.6 * turn / search.lengths.generations
        for moves in (True, False):
            scores = ask(swarm)
            top = int(scores[:, search.label].argmin())
            if scores[top, search.label] < elite_score:
                elite, elite_score = swarm[top], float(scores[top, search.label])
            if scores[top].argmax() != search.label:
                return swarm[top]
            if moves:
                masks = search.random.uniform(size=(size, len(elite))) < (1 - pull) / 2
                swarm = [numpy.where(mask, elite, one) for mask, one in zip(masks, swarm, strict=True)]
        changed = numpy.stack([(one != search.sentence).mean() for one in swarm])
        draws = search.random.uniform(size=size)
        swarm = [mutated(one) if draw < 1 - 2 * c else one for one, draw, c in zip(swarm, draws, changed, strict=True)]
    return elite


def bert_attack(search: Search) -> Sentence:
    """Li et al. 2020: a fifth of the words; candidates, of a language model there, are asked for one by one."""
    score = search.score([search.sentence])[0]
    order = numpy.argsort(search.score(search.without_each()[:-1]))
    current, changes = search.sentence, 0
    for place in order:
        if changes > int(0.2 * len(search.sentence)):
            break
        best = None
        for word in search.synonyms(search.sentence[place], search.lengths.candidates):
            tried = search.replaced(current, place, word)
            own = search.victim.probabilities([tried])[0]
            if own.argmax() != search.label:
                return tried
            if own[search.label] < score:
                best, score = tried, own[search.label]
        if best is not None:
            current, changes = best, changes + 1
    return current


def fd(search: Search) -> Sentence:
    """Papernot et al. 2016: the synonym whose change of the embedding has the signs of the gradient."""
    current = search.sentence
    for _ in range(search.lengths.iterations):
        if search.fools(current):
            break
        place = int(search.random.choice(len(current)))
        signs = numpy.sign(search.victim.gradient(current, search.label)[place])
        words = numpy.array(search.synonyms(current[place]))
        moves = numpy.sign(search.victim.embedding(words) - search.victim.embedding(current[place : place + 1]))
        current = search.replaced(current, place, int(words[numpy.abs(moves - signs).sum(1).argmin()]))
    return current


def deepwordbug(search: Search) -> Sentence:
    """Gao et al. 2018: misspells the most important words, which are asked for one by one; misspelt is unknown."""
    scores = [search.score([one])[0] for one in search.without_each()]
    current = search.sentence.copy()
    current[numpy.argsort(scores)[: search.lengths.characters]] = UNKNOWN
    search.fools(current)
    return current


def viper(search: Search) -> Sentence:
    """Eger et al. 2019: characters are replaced at random until one such sentence fools; misspelt is unknown."""
    current = search.sentence
    for _ in range(search.lengths.tries):
        # A word of five characters stays whole with a probability of 0.7 to the fifth.
        current = numpy.where(search.random.uniform(size=len(current)) < 1 - 0.7**5, UNKNOWN, search.sentence)
        if search.fools(current):
            break
    return current


ATTACKS: dict[str, tuple[Callable[[Search], Sentence], tuple[float, float]]] = {
    "TextFooler": (textfooler, (90.4, 65.9)),
    "PWWS": (pwws, (113.9, 80.1)),
    "Genetic": (genetic, (918.7, 603.3)),
    "SememePSO": (sememe_pso, (387.8, 312.9)),
    "BERTAttack": (bert_attack, (147.2, 114.4)),
    "FD": (fd, (198.1, 158.0)),
    "DeepWordBug": (deepwordbug, (70.7, 53.5)),
    "VIPER": (viper, (237.1, 184.5)),
}
"""By the names of the paper: what asks, and seconds of the original and of the semi-backward run on a T4."""


def text_case(lengths: TextLengths, texts: int) -> Case:
    """Random sentences and the network that reads them."""
    return Case(
        f"bert-{lengths.layers}-layers-{lengths.words}",
        texts,
        (lengths.words,),
        partial(Bert, lengths.layers, lengths.hidden, lengths.words),
        bounds=None,
        draw=lambda shape, generator: torch.randint(FIRST_WORD, VOCABULARY, tuple(shape), generator=generator),
    )


def attack_texts(
    attack: Callable[[Search], Sentence], lengths: TextLengths, victim: Victim, x: Tensor, y: Tensor
) -> Tensor:
    """Attack each of the sentences ``(N, words)`` with labels ``(N,)``; returns what became of them."""
    state = numpy.random.RandomState(SEED)
    pairs = zip(x.cpu().numpy(), y.tolist(), strict=True)
    found = [attack(Search(victim, sentence, label, lengths, state)) for sentence, label in pairs]
    return torch.from_numpy(numpy.stack(found)).to(x.device)


def measure_texts(results: Results[Entry], lengths: TextLengths, texts: int, budget: Budget) -> None:
    """Measure the attacks that ``results`` lack, and save after each."""
    settings = results.settings
    done = {one.attack for one in results.records if one.part == PART}
    if missing := [name for name in ATTACKS if name not in done]:
        work = text_case(lengths, texts).prepare(settings.device)
        with sharing():
            models = Models(work.model.encoder)  # type: ignore[arg-type]
            for name in missing:
                blank = Entry(PART, work.case.name, name, "", norm="linf", samples=texts)
                make = partial(_made, models, ATTACKS[name][0], lengths)
                # By FLOPs a forward pass takes a third of what it takes with both halves of a backward pass. FD asks
                # for a gradient, which is two thirds, once for each probability.
                blank = replace(blank, predicted=2.0 if name == "FD" else 3.0)
                results.add(compare(blank, make, models, work, settings, budget))
    else:
        already("table 4", results)


def _made(
    models: Models,
    attack: Callable[[Search], Sentence],
    lengths: TextLengths,
    way: str,
    work: Workload,
    settings: Settings,
) -> Contender:
    model, encoder = models.of(way)
    bert = work.model
    assert isinstance(bert, Bert)
    whole = Bert.__new__(Bert)
    nn.Module.__init__(whole)
    whole.encoder = model  # type: ignore[assignment]
    whole.embedding = nn.Embedding.from_pretrained(bert.embedding.weight.detach().clone(), freeze=way != SHIPPED)

    def run(encoder: Any, x: Tensor, y: Tensor) -> Tensor:
        return attack_texts(attack, lengths, Victim(whole, encoder, way, settings.device), x, y)

    return contender(way, whole, partial(gradprune.patch(run) if way == PATCHED else run, encoder))
