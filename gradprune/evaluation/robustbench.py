"""Records in the form that RobustBench keeps of each model of its leaderboards (Croce et al. 2021).

One JSON file for a model, ``model_info/<data set>/<threat model>/<model>.json``. Accuracies are percentages with two
decimals, and the radius is text as people write it; both are strings there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprune.attacks import AutoAttack
from gradprune.errors import OptionError, unknown
from gradprune.support.files import write_json

from .records import Record
from .tables import eps_text

THREAT_MODELS = {"Linf": "linf", "L2": "l2", "L1": "l1"}
"""Names of RobustBench, and the norms they stand for."""

FOLDER = "model_info"

MEASURED = ("dataset", "eps", "clean_acc", "autoattack_acc")
"""Fields that nobody but a measurement fills in."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What RobustBench keeps of a model.

    Attributes:
        link: Of the paper.
        name: Its title.
        authors: Separated by commas.
        additional_data: Whether it was trained with more than the training set.
        number_forward_passes: For one prediction.
        dataset: What was attacked, such as ``"cifar10"``.
        venue: Where it was published; empty is shown as unpublished.
        architecture: Of the network.
        eps: Radius of the ball, such as ``"8/255"``.
        clean_acc: Accuracy without an attack, in percent.
        reported: Robust accuracy that the authors report, in percent.
        autoattack_acc: Accuracy under AutoAttack, in percent.
        footnote: Below the table.
        unreliable: Whether AutoAttack is known to overestimate the robustness of this model.
    """

    link: str = ""
    name: str = ""
    authors: str = ""
    additional_data: bool = False
    number_forward_passes: int = 1
    dataset: str
    venue: str = ""
    architecture: str = ""
    eps: str
    clean_acc: str
    reported: str = ""
    autoattack_acc: str
    footnote: str = ""
    unreliable: bool = False

    def save(self, folder: Path, threat_model: str, model_name: str) -> Path:
        """Write the file, and the folders above it.

        Args:
            folder: The one that ``model_info`` is in.
            threat_model: One of ``THREAT_MODELS``.
            model_name: Of the file, without its ending.

        Returns:
            The file.
        """
        path = folder / FOLDER / self.dataset / threat_model / f"{model_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))
        return path


def check_about(model_name: str, about: Mapping[str, Any]) -> None:
    """Make sure that a file can be named so, and that it has such fields.

    Raises:
        OptionError: It cannot, or has not.
    """
    if not model_name or Path(model_name).name != model_name or model_name.startswith("."):
        raise OptionError(f"{model_name!r} cannot be the name of a model: pass one such as Rade2021Helper, no path")
    known = [field.name for field in dataclasses.fields(ModelInfo) if field.name not in MEASURED]
    for field in about:
        if field in MEASURED:
            raise OptionError(f"{field} is measured, it cannot be given: leave it out")
        if field not in known:
            raise OptionError(unknown("field", field, known))


def parse_about(text: str) -> tuple[str, Any]:
    """A field and its value, of ``FIELD=VALUE``; values are of the type of the field.

    Raises:
        OptionError: It is something else.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"{text!r} is no FIELD=VALUE: pass one such as architecture=ResNet-18")
    default = {field.name: field.default for field in dataclasses.fields(ModelInfo)}.get(name, "")
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise OptionError(f"{name} is true or false, not {value!r}")
        return name, value.lower() == "true"
    if isinstance(default, int):
        if not value.isdecimal():
            raise OptionError(f"{name} is a whole number, not {value!r}")
        return name, int(value)
    return name, value


def model_info(
    dataset: str, eps: float, clean: float, robust: float, about: Mapping[str, Any] | None = None
) -> ModelInfo:
    """A record of RobustBench from accuracies between 0 and 1.

    Args:
        dataset: What was attacked.
        eps: Radius of the ball.
        clean: Accuracy without an attack.
        robust: Accuracy under AutoAttack.
        about: Other fields.
    """
    return ModelInfo(
        dataset=dataset,
        eps=eps_text(eps),
        clean_acc=f"{clean:.2%}".rstrip("%"),
        autoattack_acc=f"{robust:.2%}".rstrip("%"),
        **(about or {}),
    )


def save_records(records: list[Record], folder: Path, model_name: str, about: Mapping[str, Any]) -> list[Path]:
    """Write the records of AutoAttack among others.

    A note says what of an attack is not the standard one, and on how many samples it was measured.

    Args:
        records: Of one model and data set, with no more than one of AutoAttack for each norm.
        folder: Where to put ``model_info``.
        model_name: Of the files.
        about: Fields that are not measured.

    Returns:
        The files.
    """
    written = []
    for record in records:
        if record.attack["name"] != AutoAttack.__name__ or record.eps is None:
            continue
        notes = [str(about["footnote"])] if about.get("footnote") else []
        notes += [f"{record.samples:,} samples", *_unusual(record)]
        info = model_info(record.data, record.eps, record.clean_accuracy, record.robust_accuracy, about)
        info = dataclasses.replace(info, dataset=info.dataset.replace("/", "-"), footnote="; ".join(notes))
        (threat_model,) = (name for name, norm in THREAT_MODELS.items() if norm == record.norm)
        written.append(info.save(folder, threat_model, model_name))
    return written


def _unusual(record: Record) -> list[str]:
    """The settings in which an attack differs from the standard one."""
    standard = AutoAttack()
    names = [field.name for field in dataclasses.fields(AutoAttack) if field.name not in ("norm", "eps", "seed")]
    found = []
    for name in names:
        usual, own = getattr(standard, name), record.attack.get(name)
        if own != (list(usual) if isinstance(usual, tuple) else usual):
            found.append(f"AutoAttack with {name} {own}")
    cast = record.settings.get("autocast")
    return [*found, f"autocast {cast}"] if cast else found
