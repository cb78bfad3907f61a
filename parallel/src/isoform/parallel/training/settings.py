"""What a run of training is told: a TOML file, read into dataclasses, unknown keys refused.

Every field is a key of the table named like its class::

    [data]                      [model]               [training]
    fasta = ["genome.fa.gz"]    name = "25M"          steps = 2000

    [switches]                  [switches.layout]
    loss = "tiled"              sequence = 4
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.torch.genome_lm import CONFIGURATIONS, Configuration
from isoform.reference.torch.genome_tokens import Tokenizer, codons, nucleotides

TOKENIZERS = {"codons": codons, "nucleotides": nucleotides}


class WrongSettings(ValueError):
    """Something that a run was told has no meaning; the message says which key and what has."""


@dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        fasta: Files; gzip or not. Paths are relative to the folder of the settings.
        tokens: ``"codons"`` or ``"nucleotides"``.
        length: Tokens in a window.
        batch: Windows in a step, over all copies of the model.
        at_once: Windows that a copy computes with at once; 0 is all of its own.
        held_out: The last part of the genome, which is not trained on: a fraction of its bases.
        strands: 1 or 2.
        bad_records: ``"refuse"``, or ``"skip"``: leave them out, and name them.
        markov: The order of the Markov model that the held-out part is also predicted with.
    """

    fasta: tuple[Path, ...] = ()
    tokens: Literal["codons", "nucleotides"] = "codons"
    length: int = 128
    batch: int = 16
    at_once: int = 0
    held_out: float = 0.05
    strands: int = 2
    bad_records: Literal["refuse", "skip"] = "refuse"
    markov: int = 5

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_least(self, length=1, batch=1, at_once=0)
        if self.strands not in (1, 2):
            raise WrongSettings(f"strands must be 1 or 2, got {self.strands}")
        if not 0 <= self.markov <= 12:
            raise WrongSettings(f"markov must be 0 to 12, got {self.markov}")
        if not 0 < self.held_out < 1:
            raise WrongSettings(f"held_out must be more than 0 and less than 1: {self.held_out:g}")

    @property
    def tokenizer(self) -> Tokenizer:
        """Whose words."""
        return TOKENIZERS[self.tokens]


@dataclass(frozen=True)
class Training:
    """How long, how fast, and what is kept.

    Attributes:
        steps: Updates of the parameters.
        learning_rate: The highest.
        warmup: Steps in which the rate rises to it.
        decay: ``"cosine"``: it falls from there to ``floor`` times itself at the last step;
            ``"constant"``: it stays.
        floor: That fraction.
        betas, weight_decay: Of AdamW. Only matrices decay.
        clip: The norm that the gradient of all parameters is shortened to, if it is longer.
        dtype: ``"float32"``, or ``"bfloat16"``: parameters and activations have 16 bits, and the
            optimizer keeps float32 copies.
        seed: Of the first parameters, and of the order of windows.
        evaluate_every, checkpoint_every: Steps; both are done after the last step too.
        keep: Checkpoints that are kept.
    """

    steps: int = 600
    learning_rate: float = 2e-3
    warmup: int = 50
    decay: Literal["cosine", "constant"] = "cosine"
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    evaluate_every: int = 50
    checkpoint_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_least(self, steps=1, warmup=0, seed=0, evaluate_every=1, checkpoint_every=1, keep=1)
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise WrongSettings(f"{name} must be more than 0, got {getattr(self, name):g}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise WrongSettings(f"betas must be two numbers from 0 to less than 1: {self.betas}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(self.steps - 1 - self.warmup, 1)
        share = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.learning_rate * share


SMALL = Configuration("small", 4, 128, 4, rotary_dim=32)
"""What a processor trains in minutes: 0.8 million parameters."""


@dataclass(frozen=True)
class Settings:
    """All of it.

    Attributes:
        data: What is read.
        model: What is trained.
        switches: Which technique of long-sequence training is on.
        training: How long, how fast, and what is kept.
    """

    data: Data = field(default_factory=Data)
    model: Configuration = SMALL
    switches: Switches = field(default_factory=Switches)
    training: Training = field(default_factory=Training)

    def facts(self) -> dict[str, Any]:
        """What must be the same for a run to go on from another's checkpoint, by name.

        Not the layout and how numbers are computed, which change rounding alone; nor how long to
        train, and what is kept.
        """
        given = {"data": asdict(self.data), "model": asdict(self.model)}
        given["training"] = asdict(self.training)
        for table, name in _FREE:
            del given[table][name]
        if self.training.decay == "constant":  # then it does not matter how long it will be
            del given["training"]["steps"]
        found = {f"{table}.{name}": x for table, own in given.items() for name, x in own.items()}
        return {**found, "data.fasta": [path.name for path in self.data.fasta]}


_FREE = (
    ("data", "at_once"),
    ("data", "markov"),
    ("model", "name"),
    ("training", "evaluate_every"),
    ("training", "checkpoint_every"),
    ("training", "keep"),
)


def load(path: Path) -> Settings:
    """Settings from the TOML file at ``path``; what it does not say is as in :class:`Settings`.

    Args:
        path: The file. Those that it names are found from its folder.

    Raises:
        OSError: It cannot be read.
        WrongSettings: It is no TOML, or holds something without meaning; the message says what.
    """
    try:
        given = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise WrongSettings(f"{path} is no TOML: {problem}") from problem
    try:
        found = parse(given)
    except WrongSettings as problem:
        raise WrongSettings(f"{path}: {problem}") from problem
    files = tuple(path.parent / file for file in found.data.fasta)
    return replace(found, data=replace(found.data, fasta=files))


def parse(given: Mapping[str, Any]) -> Settings:
    """Settings from the tables that are ``given``, as TOML has them.

    Args:
        given: As a TOML file gives them.

    Raises:
        WrongSettings: As :func:`load`.
    """
    _check_known("", given, ("data", "model", "switches", "training"))
    for name, table in given.items():
        if not isinstance(table, dict):
            raise WrongSettings(f"{name} must be a table, got {table!r}")
    data = dict(given.get("data", {}))
    if isinstance(data.get("fasta"), str):
        data["fasta"] = [data["fasta"]]
    found = _made(Data, "data", data)
    switches = dict(given.get("switches", {}))
    if "layout" in switches:
        switches["layout"] = _made(Layout, "switches.layout", switches["layout"])
    return Settings(
        found,
        _model(dict(given.get("model", {})), found),
        _made(Switches, "switches", switches),
        _made(Training, "training", given.get("training", {})),
    )


def _model(given: dict[str, Any], data: Data) -> Configuration:
    """A known model, some of its sizes changed, with the vocabulary of the tokens."""
    name = given.pop("name", SMALL.name)
    known = {**CONFIGURATIONS, SMALL.name: SMALL}
    if name not in known:
        raise WrongSettings(f"model.name must be one of {', '.join(known)}, got {name!r}")
    words = len(data.tokenizer.vocabulary)
    if "vocabulary" in given:
        raise WrongSettings(f"model.vocabulary follows from data.tokens: {words}; leave it out")
    base = asdict(known[name])
    if "hidden" in given or "heads" in given:  # what follows from these
        base |= {"ffn": 0, "rotary_dim": 0}
    base["vocabulary"] = words
    _check_known("model", given, base)
    changed = ", ".join(f"{key}={x}" for key, x in given.items())
    called = f"{name} with {changed}" if changed else name
    return cast(Configuration, _made(Configuration, "model", {**base, **given, "name": called}))


def _made(kind: Any, table: str, given: Mapping[str, Any]) -> Any:
    """A dataclass of what a table says; TOML has no tuples and writes whole floats as integers."""
    if not isinstance(given, Mapping):
        raise WrongSettings(f"{table} must be a table, got {given!r}")
    hints = get_type_hints(kind)
    _check_known(table, given, hints)
    read: dict[str, Any] = {}
    for name, x in given.items():
        hint = hints[name]
        if isinstance(x, int) and hint is float and not isinstance(x, bool):
            x = float(x)
        if get_origin(hint) is tuple:
            if not isinstance(x, list):
                raise WrongSettings(f"{table}.{name} must be a list, got {x!r}")
            x = tuple(Path(one) if Path in get_args(hint) else one for one in x)
        if hint in (int, float, bool) and type(x) is not hint:
            raise WrongSettings(f"{table}.{name} must be {_A[hint]}, got {x!r}")
        read[name] = x
    try:
        return kind(**read)
    except (TypeError, ValueError) as problem:
        raise WrongSettings(f"{table}: {problem}") from problem


_A: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


def _check_known(table: str, given: Mapping[str, Any], known: Any) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise WrongSettings(f"there is no {f'{table}.' if table else ''}{name}{meant}")


def _check_choices(settings: Any) -> None:
    for name, hint in get_type_hints(type(settings)).items():
        choices, value = get_args(hint), getattr(settings, name)
        if choices and all(isinstance(one, str) for one in choices) and value not in choices:
            raise WrongSettings(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_least(settings: Any, **least: int) -> None:
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise WrongSettings(f"{name} must be at least {bound}, got {getattr(settings, name)}")
