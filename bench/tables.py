"""The tables of the benchmarks in Markdown, padded so that they read well as plain text too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from .cases import Case, find_case
from .record import (
    BARE_STEP,
    BASELINES,
    EAGER_BACKWARD,
    EAGER_TRAINING,
    FROZEN,
    FULL_BATCH,
    GRADPRUNE,
    NOTHING_DROPPED,
    RIVAL_TRAININGS,
    RIVALS,
    AnyRecord,
    Attacked,
    Comparison,
    Contest,
    Iteration,
    Kernels,
    ObjectiveRecord,
    Ratio,
    Record,
    Results,
    Trained,
    limit,
)

STEP_LEGEND = """\
- ms/step (or us): median over the rounds of attack / steps, so that what happens once per attack is in it; IQR: its
  interquartile range.
- vs: how many times as fast as that baseline, median of the ratios within each round; below 1 is slower. In brackets
  the quartiles of these ratios.
- best alternative: the fastest of frozen eager, frozen + compile(model), compile(step) and, where it was run,
  max-autotune.
- of limit: how many times the isolated-kernel limit a step takes (`bench kernels`: convolutions and linear layers by
  themselves, each with the fastest kernel found).
- FLOPs say: the ratio to eager backward() if only the FLOPs of contractions counted.
- compile s: first call, with empty disk caches and a compiler that is already started; break-even: steps after which it
  has made up for compiling longer than the best alternative.
- saved MB: alive from forward to backward; gradprune's by its report. peak MB: most that a step holds beyond what was
  held before. "-": cannot be counted.
- gradient error: largest difference to float64 relative to the largest value / in the Euclidean norm; the worst of
  three points. A ReLU whose input rounds to the other side of zero costs up to percents, in eager too.
- pixels off: share of the adversarial values that differ from those of eager. success: inputs moved to another class.
- Every candidate was checked against float64 at two points and called with x_adv = x; one that fails is not timed."""

LEGENDS = {
    "ablation": """\
- without / with: how many times as long a step takes without it, by rounds, quartiles in brackets. Above 1 it helps;
  below 1 a step is faster without.
- saved MB by gradprune's report, peak MB measured, compile s with empty disk caches.""",
    "compile": """\
- Seconds from the call of the first step until it has run, in a process of its own: cold with empty disk caches, warm
  with those that the cold process left. Importing torch and building the model are not part of it, importing the
  compiler is.""",
    "kernels": """\
- GFLOP/s: FLOPs of all layers of a class over the time they take by themselves. plain: the kernel that eager calls;
  best: the fastest of all that were tried for each layer, weights already packed; who won is named with its layers.
- limit: forward and input gradient of all layers, each the fastest way, one after another.""",
    "attacks": """\
- s: median over the rounds of the whole attack; IQR: its interquartile range. vs: how many times as fast as that way,
  median of the ratios within each round; below 1 is slower. In brackets the quartiles of these ratios.
- Torchattacks: the same algorithm with the same settings on live parameters; frozen: on a model whose parameters
  require no gradient; frozen + compile(model): on torch.compile of that. gradprune: Runtime(), not compiled:
  Runtime(compile=False), both with active_set=False: in Torchattacks, samples leave only where the algorithm says so.
- Networks with more than ten classes are attacked as classifiers of their first ten: of more, DeepFool of Torchattacks
  would look at all, which is another algorithm.
- compile s: what the first attack took longer than the median, with empty disk caches and a compiler that is already
  started; compilations: how often gradprune compiled the network (at most two batch sizes of gradients, two of logits).
- shown: inputs that the network was shown during one attack, where it is not compiled; in the summary, how many times
  as many as by Torchattacks. More or fewer is another amount of work: CW of Torchattacks stops as soon as the batch's
  loss grows; Square takes its random course; DeepFool of Torchattacks runs ten backward passes for each input that it
  shows, one input at a time, gradprune's one for each. Square is run in a tenth of the ball, to use up its queries.
- success: inputs moved to another class; distance: median norm of these perturbations. pixels off: share of the
  adversarial values that differ from those of Torchattacks by more than 1e-6, where the algorithm draws nothing at
  random. DeepFool of Torchattacks overshoots at every step, the published algorithm and gradprune's at the end.
- Every way was checked to return valid inputs within the ball; one that fails is not timed.
- Overhead: PGD from the input itself. outside: share of an attack's time in which no compiled function ran, from a
  clock around them; the median of some attacks that were not timed otherwise. vs bare step: the loop of `bench step`
  over a step that is compiled as a whole, update included.
- Active set: a network trained on handwritten digits, held-out digits and their true labels, in the smallest ball in
  which a short PGD fools at least half of them. of full batch: time relative to the same attack with active_set=False.
  AutoAttack drops between its parts, and between the classes that they aim at, what is fooled in any case. "nothing
  dropped": all samples in every part and against every class; Square alone ends where it succeeds, as its algorithm has
  it. other verdicts: samples that are fooled and are not with active_set=False, or the other way round.""",
    "training": """\
- s: median over the rounds of one iteration: PGD of so many steps from the input itself with the model in evaluation
  mode, forward and backward pass over what it found in training mode, update by SGD with momentum. IQR: its
  interquartile range.
- eager, live parameters: the attack by loss.backward(), which computes all weight gradients too. frozen: parameters
  require no gradient during the attack, as [SB] proposes; + compile(model): torch.compile(model) in the attack,
  + compile(gradient): torch.compile(torch.func.grad(loss)), both with a compiled loss in the outer step. gradprune:
  AdversarialTrainer(model, optimizer, PGDTraining(attack=PGD(...))).step(x, y).
- vs: how many times as fast as that way, median of the ratios within each round; below 1 is slower. In brackets the
  quartiles of these ratios. best alternative: the fastest of those with frozen parameters.
- FLOPs say: (6K + 6) / (4K + 6), the ratio to live parameters if only FLOPs counted and K steps computed no weight
  gradients ([SB]).
- compile s: what the first iteration took longer than the second, with empty disk caches and a compiler that is already
  started; the compiled code serves all numbers of steps. recompiled: graphs that were compiled after it.
- peak MB: most that an iteration holds beyond what was held before it, where no weight has a gradient.
- loss error, update error: of an iteration from the initial weights, loss and change of the weights against float64,
  relative, in the Euclidean norm; eager's own is that of eager autograd. Signs of gradients next to zero, and ReLUs
  that round to the other side, add up over the steps of an attack.
- Every way was checked so for every number of steps; one that fails is not timed. Batches are random, with random
  labels, another one at every iteration and the same for all.""",
    "objectives": """\
- clean, PGD-20: accuracy on held-out digits after the last epoch, as they are and under PGD of 20 steps in the Linf
  ball of 0.2 that was trained in. to plain, to pgd: difference of PGD-20 in points. best: the largest PGD-20 of any
  epoch. s an epoch: median, without evaluation.
- pgd, trades, mart and awp attack with PGD of 7 steps; free uses each batch 8 times, so that these run about as many
  passes over a batch. Adam and one cycle of the learning rate, the same for all.""",
}


LABELLED = "Random weights and random inputs, always the same; labels are the network's own clean predictions."
RANDOM = {"training": "Random weights and random inputs, always the same; labels are random, too."}
LEARNING = "Real data: 1347 handwritten digits of scikit-learn to train on, 450 to measure on."

Column = Callable[[Comparison, Record], str]


def document(results: Results, limits: Sequence[AnyRecord] = ()) -> str:
    """Everything about one file, in Markdown.

    Args:
        results: The file.
        limits: Records of a kernels file with the same settings.
    """
    here, body = results.environment, []
    if results.kind == "attacks":
        body += _attacks(results)
    elif results.kind == "training":
        body += _training(results)
    elif results.kind == "objectives":
        body.append(_objectives(results))
    elif results.kind == "compile":
        found = [record for record in results.records if isinstance(record, Record)]
        head = ["case", "candidate", "cold s", "warm s"]
        body.append(
            grid(head, ([r.case, r.candidate, _figure(r.cold_seconds), _figure(r.warm_seconds)] for r in found))
        )
        body += _failures(found)
    elif results.kind not in ("kernels", "ablation"):
        body.append(_summary(results, limits))
    for case in results.cases if results.kind not in ("compile", "attacks", "training", "objectives") else ():
        one = Comparison(results.records, case)
        body.append(f"## {case}")
        if results.kind == "kernels":
            body.append(_kernels(kernel_classes(results.records, case), limit(results.records, case)))
            continue
        body += [_about(one, find_case(case), results.settings.steps), *_failures(one.failed)]
        if results.kind == "ablation":
            body.append(_columns(one, ABLATION))
        else:
            body += [_columns(one, _times(one, limit(limits, case))), _columns(one, FIGURES)]
    parts = [
        f"# gradprune bench {results.kind}",
        f"{here.get('gpu', here['cpu'])}, **{results.settings}**, BLAS **{here['blas']}**, oneDNN {here['onednn']}, "
        f"torch {here['torch']}. " + (LEARNING if results.kind == "objectives" else RANDOM.get(results.kind, LABELLED)),
        *body,
        LEGENDS.get(results.kind, STEP_LEGEND),
        "## Environment",
        "\n".join(f"- {name}: {value}" for name, value in here.items()),
    ]
    return "\n\n".join(parts) + "\n"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (head, rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def ratio_text(ratio: Ratio | float | None, *, spread: bool = False) -> str:
    """Such as ``1.52x`` or, with its quartiles, ``1.52x (1.49-1.55)``."""
    if isinstance(ratio, Ratio):
        return f"{ratio.median:.2f}x" + f" ({ratio.low:.2f}-{ratio.high:.2f})" * spread
    return "-" if ratio is None else f"{ratio:.2f}x"


def _figure(value: float | None, unit: float = 1.0) -> str:
    """Three significant digits, ``-`` for nothing."""
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.1f}" if scaled >= 100 else f"{scaled:.3g}"


def _errors(largest: float | None, euclidean: float | None) -> str:
    return "-" if largest is None or euclidean is None else f"{largest:.0e} / {euclidean:.0e}"


def _failures(records: Iterable[Record]) -> list[str]:
    return [f"**{record.candidate} failed:** {record.failed}" for record in records if record.failed]


def _columns(one: Comparison, columns: Mapping[str, Column]) -> str:
    """A table with a row for each candidate that was timed."""
    return grid([*columns], ([column(one, record) for column in columns.values()] for record in one.measured.values()))


FIGURES: dict[str, Column] = {
    "candidate": lambda one, record: record.candidate,
    "GFLOP": lambda one, record: _figure(record.flops, 1e9),
    "saved MB": lambda one, record: _figure(record.saved_bytes, 1e6),
    "peak MB": lambda one, record: _figure(record.peak_bytes, 1e6),
    "gradient error": lambda one, record: _errors(record.gradient_error, record.gradient_error_l2),
    "eager's own": lambda one, record: _errors(record.eager_error, record.eager_error_l2),
    "pixels off": lambda one, record: f"{record.differing or 0:.1%}",
    "success": lambda one, record: f"{record.success_rate or 0:.1%}",
    "eager's success": lambda one, record: f"{record.eager_success_rate or 0:.1%}",
}

ABLATION: dict[str, Column] = {
    "candidate": FIGURES["candidate"],
    "ms/step": lambda one, record: _figure(record.median, 1e-3),
    "without / with": lambda one, record: ratio_text(one.ratio(GRADPRUNE, record.candidate), spread=True),
    "compile s": lambda one, record: _figure(record.cold_seconds),
    **{name: FIGURES[name] for name in ("saved MB", "peak MB", "gradient error")},
}


def _times(one: Comparison, floor: float | None) -> dict[str, Column]:
    """Columns about time; ``floor`` is the isolated-kernel limit in seconds."""
    unit, name = (1e-6, "us") if max((r.median for r in one.measured.values()), default=1) < 1e-3 else (1e-3, "ms")

    def versus(baseline: str) -> Column:
        return lambda one, record: ratio_text(one.ratio(record.candidate, baseline))

    return {
        "candidate": FIGURES["candidate"],
        f"{name}/step": lambda one, record: _figure(record.median, unit),
        "IQR": lambda one, record: _figure(record.iqr, unit),
        **{f"vs {baseline}": versus(baseline) for baseline in BASELINES},
        "vs best alternative": lambda one, record: ratio_text(
            one.ratio(record.candidate, one.best_alternative), spread=True
        ),
        "of limit": lambda one, record: _figure(record.median / floor if floor else None),
        "FLOPs say": lambda one, record: ratio_text(one.predicted_ratio(record.candidate)),
        "compile s": lambda one, record: _figure(record.cold_seconds),
        "break-even": _break_even,
    }


def _break_even(one: Comparison, record: Record) -> str:
    """Steps, ``never`` for what compiles only to be slower, ``-`` for what compiles nothing or is the best itself."""
    steps = one.break_even(record.candidate)
    never = steps is None and record.cold_seconds is not None and record.candidate != one.best_alternative
    return "never" if never else _figure(steps)


def _summary(results: Results, limits: Sequence[AnyRecord]) -> str:
    """One row for each case: gradprune against what matters most."""
    rows = []
    for case in results.cases:
        one, floor = Comparison(results.records, case), limit(limits, case)
        ours, best = one.measured.get(GRADPRUNE), one.best_alternative
        row = [case, _figure(ours.median, 1e-3) if ours else "failed or not run"]
        row += [f"{_figure(one.measured[best].median, 1e-3)} {best}" if best else "-"]
        row += [ratio_text(one.ratio(GRADPRUNE, best), spread=True)]
        row += [ratio_text(one.ratio(GRADPRUNE, baseline)) for baseline in (FROZEN, EAGER_BACKWARD)]
        rows.append([*row, _figure(ours.median / floor if ours and floor else None)])
    head = "case", "gradprune ms", "best alternative ms", "vs best alternative", f"vs {FROZEN}", f"vs {EAGER_BACKWARD}"
    return "## Summary\n\n" + grid([*head, "of limit"], rows)


def _eps(size: float, like: float) -> str:
    """A radius or a step size as it is usually written."""
    return f"{size * 255:g}/255" if like < 0.1 else f"{size:g}"


def _about(one: Comparison, case: Case, steps: int) -> str:
    """What was attacked and how."""
    records = one.measured.values()
    rounds, load = max((len(r.seconds) for r in records), default=0), max((r.load or 0 for r in records), default=0)
    return f"{_attacked(case, f'{steps} steps of ')}; {rounds} rounds; load average {load:.1f} at the start."


def _attacked(case: Case, steps: str = "") -> str:
    """The batch and its attack."""
    shape = "x".join(map(str, case.shape))
    eps, step = (_eps(size, case.eps) for size in (case.eps, case.step_size))
    return f"Batch {case.batch} of {shape}; {steps}PGD in the Linf ball, eps {eps}, step size {step}"


def kernel_classes(records: Sequence[AnyRecord], case: str) -> dict[tuple[str, str], list[Kernels]]:
    """The layers of one case by class and direction, in alphabetical order."""
    found: dict[tuple[str, str], list[Kernels]] = {}
    for record in records:
        if isinstance(record, Kernels) and record.case == case:
            found.setdefault((record.kind, record.direction), []).append(record)
    return dict(sorted(found.items()))


def rates(layers: Sequence[Kernels]) -> tuple[float, float]:
    """FLOP/s of some layers together, by the plain and by the best kernel of each."""
    flops = sum(layer.count * layer.flops for layer in layers)
    return flops / sum(layer.plain for layer in layers), flops / sum(layer.best[0] for layer in layers)


def _kernels(classes: dict[tuple[str, str], list[Kernels]], floor: float | None) -> str:
    rows = []
    for (kind, direction), layers in classes.items():
        winners: Counter[str] = Counter()
        for layer in layers:
            winners[layer.best[1]] += layer.count
        plain, best = rates(layers)
        row = [f"{kind}, {direction}", str(winners.total()), _figure(sum(r.count * r.flops for r in layers), 1e9)]
        row += [_figure(sum(layer.plain for layer in layers), 1e-3), _figure(plain, 1e9)]
        row += [_figure(sum(layer.best[0] for layer in layers), 1e-3), _figure(best, 1e9)]
        rows.append([*row, ", ".join(f"{name} {count}" for name, count in winners.most_common())])
    head = ["kernels", "layers", "GFLOP", "plain ms", "plain GFLOP/s", "best ms", "best GFLOP/s", "best by"]
    plain = sum(layer.plain for layers in classes.values() for layer in layers)
    return f"Limit **{_figure(floor, 1e-3)} ms**; plain kernels {_figure(plain, 1e-3)} ms.\n\n{grid(head, rows)}"


def _attacks(results: Results) -> list[str]:
    """All sections about whole attacks."""
    summary = [
        [
            f"{contest.case}, {contest.attack}",
            _figure(contest.measured[GRADPRUNE].median) if GRADPRUNE in contest.measured else "-",
            *(ratio_text(contest.ratio(GRADPRUNE, rival), spread=True) for rival in RIVALS),
            ratio_text(contest.work),
        ]
        for contest in Contest.all(results.records, "attacks")
    ]
    body = []
    if summary:
        head = ["attack", "gradprune s", *(f"vs {rival}" for rival in RIVALS), "inputs shown"]
        body.append("## Summary\n\n" + grid(head, summary))
    sections = [(case, "attacks", ATTACKS) for case in results.cases]
    for title, part, columns in (*sections, ("Overhead", "overhead", OVERHEAD), ("Active set", "active-set", ACTIVE)):
        contests = Contest.all(results.records, part, title if part == "attacks" else None)
        records = [(contest, record) for contest in contests for record in contest.records]
        if not records:
            continue
        rounds, load = max(len(r.seconds) for _, r in records), max(r.load or 0 for _, r in records)
        body += [f"## {title}", f"Up to {rounds} rounds; load average up to {load:.1f} when an attack was begun."]
        body += _reasons(record for _, record in records)
        rows = ([column(contest, record) for column in columns.values()] for contest, record in records)
        body.append(grid([*columns], rows))
    return body


def _reasons(records: Iterable[Attacked]) -> list[str]:
    """Why some were not timed, each reason once."""
    failed: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.failed:
            failed.setdefault((record.candidate, record.failed), []).append(record.attack)
    return [f"**{candidate} failed:** {why} ({', '.join(attacks)})" for (candidate, why), attacks in failed.items()]


Cell = Callable[[Contest, Attacked], str]


def _timed(figure: Callable[[Attacked], float | None]) -> Cell:
    """A column about what has been timed."""
    return lambda contest, record: _figure(figure(record)) if record.seconds else "-"


def _against(baseline: str, *, inverse: bool = False, spread: bool = False) -> Cell:
    """A column of ratios to one candidate; the inverse ones as percentages of its time."""

    def cell(contest: Contest, record: Attacked) -> str:
        ratio = contest.ratio(*((baseline, record.candidate) if inverse else (record.candidate, baseline)))
        if not inverse:
            return ratio_text(ratio, spread=spread)
        return f"{ratio.median:.1%} ({ratio.low:.1%}-{ratio.high:.1%})" if ratio else "-"

    return cell


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


ATTACKS: dict[str, Cell] = {
    "attack": lambda contest, record: f"{record.attack}, {record.candidate}",
    "s": _timed(lambda record: record.median),
    "IQR": _timed(lambda record: record.iqr),
    **{f"vs {rival}": _against(rival) for rival in RIVALS},
    "compile s": _timed(lambda record: record.compile_seconds),
    "compilations": lambda contest, record: str(record.compilations or "-"),
    "shown": lambda contest, record: "-" if record.shown is None else f"{record.shown:,}",
    "success": lambda contest, record: _share(record.success_rate),
    "distance": lambda contest, record: f"{_figure(record.distance)} {record.norm if record.distance else ''}".strip(),
    "pixels off": lambda contest, record: _share(record.differing),
}

OVERHEAD: dict[str, Cell] = {
    "attack": lambda contest, record: f"{record.case}, {record.attack}, {record.candidate}",
    "s": ATTACKS["s"],
    "IQR": ATTACKS["IQR"],
    "ms/step": _timed(lambda record: 1e3 * record.median / record.steps if record.steps else None),
    f"vs {BARE_STEP}": _against(BARE_STEP, spread=True),
    f"of {BARE_STEP}": _against(BARE_STEP, inverse=True),
    "outside": lambda contest, record: "-" if record.outside_share is None else f"{record.outside_share:.2%}",
    **{name: ATTACKS[name] for name in ("compile s", "success", "pixels off")},
}

ACTIVE: dict[str, Cell] = {
    "attack": ATTACKS["attack"],
    "eps": lambda contest, record: "-" if record.eps is None else _eps(record.eps, record.eps),
    "s": ATTACKS["s"],
    "IQR": ATTACKS["IQR"],
    "of full batch": _against(FULL_BATCH, inverse=True),
    "of nothing dropped": _against(NOTHING_DROPPED, inverse=True),
    "robust accuracy": lambda contest, record: _share(None if record.success_rate is None else 1 - record.success_rate),
    "other verdicts": lambda contest, record: "-" if record.other_verdicts is None else str(record.other_verdicts),
    **{name: ATTACKS[name] for name in ("compile s", "compilations")},
}


def _training(results: Results) -> list[str]:
    """All sections about iterations of training."""
    summary, body = [], []
    for case in results.cases:
        iterations = Iteration.all(results.records, case)
        for one in iterations:
            ours, best = one.measured.get(GRADPRUNE), one.best_alternative
            row = [f"{case}, {one.steps} step{'s' * (one.steps > 1)}", _figure(ours.median) if ours else "-"]
            row += [ratio_text(one.predicted_ratio), ratio_text(one.ratio(GRADPRUNE, EAGER_TRAINING), spread=True)]
            row += [f"{_figure(one.measured[best].median)} {best}" if best else "-"]
            summary.append([*row, ratio_text(one.ratio(GRADPRUNE, best), spread=True)])
        records = [record for one in iterations for record in one.records]
        rounds, load = max((len(r.seconds) for r in records), default=0), max((r.load or 0 for r in records), default=0)
        about = f"{_attacked(find_case(case))}; up to {rounds} rounds; load average up to {load:.1f} at their start."
        body += [f"## {case}", about]
        body += list(dict.fromkeys(f"**{r.candidate} failed:** {r.failed}" for r in records if r.failed))
        rows = [[column(one, r) for column in TRAINING.values()] for one in iterations for r in one.measured.values()]
        body.append(grid([*TRAINING], rows))
    head = [
        "iteration",
        "gradprune s",
        "FLOPs say",
        f"vs {EAGER_TRAINING}",
        "best alternative s",
        "vs best alternative",
    ]
    return ["## Summary\n\n" + grid(head, summary), *body]


def _objectives(results: Results) -> str:
    """What every objective has come to, plain training first."""
    records = {record.candidate: record for record in results.records if isinstance(record, ObjectiveRecord)}
    plain, madry = (records.get(name) for name in ("plain", "pgd"))
    rows = []
    for name, record in records.items():
        gains = []
        for other in (plain, madry):
            gains.append("-" if other in (None, record) else f"{100 * (record.robust[-1] - other.robust[-1]):+.1f}")
        best = max(record.robust)
        rows.append(
            [
                name,
                f"{record.clean[-1]:.1%}",
                f"{record.robust[-1]:.1%}",
                *gains,
                f"{best:.1%} ({record.robust.index(best) + 1})",
                str(record.updates),
                _figure(record.median),
            ]
        )
    return grid(
        ["objective", "clean", "PGD-20", "to plain", "to pgd", "best (epoch)", "updates", "s an epoch"],
        rows,
    )


def _versus(baseline: str) -> Callable[[Iteration, Trained], str]:
    return lambda one, record: ratio_text(one.ratio(record.candidate, baseline))


def _error(own: float | None) -> str:
    return "-" if own is None else f"{own:.0e}"


TRAINING: dict[str, Callable[[Iteration, Trained], str]] = {
    "steps, way": lambda one, record: f"{record.steps}, {record.candidate}",
    "s": lambda one, record: _figure(record.median),
    "IQR": lambda one, record: _figure(record.iqr),
    **{f"vs {name}": _versus(name) for name in (EAGER_TRAINING, *RIVAL_TRAININGS)},
    "FLOPs say": lambda one, record: "-" if record.candidate == EAGER_TRAINING else ratio_text(one.predicted_ratio),
    "compile s": lambda one, record: _figure(record.compile_seconds),
    "recompiled": lambda one, record: "-" if record.recompilations is None else str(record.recompilations),
    "peak MB": lambda one, record: _figure(record.peak_bytes, 1e6),
    "loss error": lambda one, record: _error(record.loss_error),
    "eager's own loss": lambda one, record: _error(record.eager_loss_error),
    "update error": lambda one, record: _error(record.update_error),
    "eager's own update": lambda one, record: _error(record.eager_update_error),
}
