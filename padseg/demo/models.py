"""The models that the page offers, with what `padseg doctor` says of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from padseg.errors import ModelUnavailable
from padseg.methods import METHODS, check_settings


class Offer(NamedTuple):
    """A model of the picker. state: the doctor's word or two; message: its line, with the remedy."""

    model: str
    state: str
    message: str

    @property
    def label(self) -> str:
        return f'{self.model} – {self.state}'


def offers(models: Sequence[str]) -> list[Offer]:
    return [offer(model) for model in models]


def offer(model: str) -> Offer:
    """What `padseg doctor` says of a model, without asking the hub if it is offline."""
    from padseg.backbones.availability import model_state

    state, source = model_state(model)
    try:
        if source:
            check_settings(source.spec)
    except ModelUnavailable as error:
        return Offer(model, error.state, str(error))
    return Offer(model, state.state, state.message)


def methods_for(task: str) -> list[str]:
    """The methods of a task, the default first."""
    return [name for name, method in METHODS.items() if method.TASK == task]
