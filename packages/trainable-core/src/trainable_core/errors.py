"""Every exception and warning of the library.

`TrainableError` is the base; each leaf also inherits the nearest builtin, so ``except TrainableError`` and
``except LookupError`` both work. Constructors take facts, keep them as attributes, and write the sentence.
`pydantic.ValidationError` passes through untouched: it already names the field.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trainable_core.key import Key


INSTALL: Final = {
    "torch": "pip install trainable-torch",
    "keras": "pip install trainable-keras",
    "tf_keras": "pip install 'trainable-keras[legacy]'",
}
"""How the backends of this project are installed, by name; a backend that is not in it comes with its own plugin."""


def install_hint(backend: str) -> str:
    """Return a ``Hint`` line on how to get a backend; of a name that we don't know nothing is said to be installable.

    Examples
    --------
    >>> install_hint("torch")
    'Hint: pip install trainable-torch'
    >>> print(install_hint("torhc"))
    Hint: did you mean 'torch'? Backends of this project: keras, tf_keras, torch; others come with their own plugins.
    """
    if backend in INSTALL:
        return f"Hint: {INSTALL[backend]}"
    guess = nearest(backend, INSTALL).strip().removeprefix("Hint: ")
    known = f"Backends of this project: {', '.join(sorted(INSTALL))}; others come with their own plugins."
    return " ".join(filter(None, ("Hint:", guess, known)))


def nearest(asked: object, known: Iterable[str]) -> str:
    """Return a ``Hint`` line naming the known word closest to the one asked for, or an empty string."""
    words = list(known)
    close = difflib.get_close_matches(str(asked), words, n=1, cutoff=0.5)
    if not close:  # one that differs in nothing but case is as near as can be
        folded = {word.casefold(): word for word in reversed(words)}
        close = [folded[word] for word in difflib.get_close_matches(str(asked).casefold(), list(folded), 1, 0.5)]
    return f"\nHint: did you mean {close[0]!r}?" if close else ""


TOLD_FAILURES: Final = 5
"""How many broken plugins a message tells of."""

TOLD_LENGTH: Final = 200
"""How many characters it tells of each one's reason where more are broken; three times as many where all are told."""


def _failures(failed: Mapping[str, str]) -> list[str]:
    """Return a line for each of the first broken plugins, and how many more there are."""
    lines = []
    more = len(failed) - TOLD_FAILURES
    length = TOLD_LENGTH if more > 0 else 3 * TOLD_LENGTH
    for name, reason in list(failed.items())[:TOLD_FAILURES]:
        text = " ".join(reason.split())
        lines.append(f"plugin {name!r} failed: {text if len(text) <= length else text[:length] + ' ...'}")
    return [*lines, f"{more} more plugins failed: `trainable doctor` shows them all"] if more > 0 else lines


class TrainableError(Exception):
    """Base of everything the library raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle message and facts: a constructor's facts can't be had back from the message."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class UnknownQuantizerError(TrainableError, LookupError):
    """Raised when no registered quantizer answers to a key."""

    def __init__(
        self,
        key: Key,
        known: Collection[Key],
        failed: Mapping[str, str],
        *,
        known_backends: Collection[str] = (),
        built_in: Collection[str] = (),
        elsewhere: Collection[str] = (),
    ) -> None:
        self.key, self.known, self.failed, self.elsewhere = key, list(known), dict(failed), list(elsewhere)
        lines = [f"no quantizer is registered for {key}"]
        lines.append("registered for this backend: " + (", ".join(sorted({str(k) for k in known})) or "none"))
        lines += _failures(failed)
        if key.backend not in known_backends:
            lines.append(install_hint(key.backend))
        elif elsewhere and key.quantizer_id not in {k.quantizer_id for k in known}:
            lines.append(f"Hint: {key.quantizer_id!r} exists only for other backends: {', '.join(elsewhere)}.")
        elif own := [k for k in known if k.quantizer_id == key.quantizer_id]:
            lines.append(_grids_hint(key, own, known))
        else:
            methods = {k.quantizer_id for k in known} | set(built_in)
            hint = "" if key.quantizer_id in methods else nearest(key.quantizer_id, methods).strip()
            lines.append(
                hint or "Hint: `trainable list` shows every quantizer; `trainable doctor` shows broken plugins."
            )
        super().__init__("\n".join(lines))


def _grids_hint(key: Key, own: Collection[Key], known: Collection[Key]) -> str:
    """Return a ``Hint`` line on a method that is registered, but not for this target and grid."""
    grids = sorted({str(k.method) for k in own if k.target == key.target})
    if not grids:
        targets = " and ".join(sorted({str(k.target) for k in own}))
        return f"Hint: {key.quantizer_id} is a training method for {targets} alone."
    others = sorted({k.quantizer_id for k in known if (k.target, k.method) == (key.target, key.method)})
    hint = f"Hint: {key.quantizer_id} needs method: {' or '.join(grids)}"
    return f"{hint}; {key.method} has {', '.join(others)}." if others else f"{hint}."


class DuplicateQuantizerError(TrainableError, ValueError):
    """Raised when two classes answer to one key."""

    def __init__(self, key: Key, providers: Collection[str]) -> None:
        self.key, self.providers = key, list(providers)
        super().__init__(
            f"{len(self.providers)} quantizers are registered for {key}: {'; '.join(self.providers)}\n"
            "Hint: uninstall one, or switch a plugin off with TRAINABLE_DISABLE_PLUGINS=name."
        )


class UnknownBackendError(TrainableError, LookupError):
    """Raised when no installed plugin provides a backend."""

    def __init__(self, backend: str, known: Collection[str], failed: Mapping[str, str]) -> None:
        self.backend, self.known, self.failed = backend, list(known), dict(failed)
        lines = [f"no backend {backend!r} is installed; installed: {', '.join(sorted(known)) or 'none'}"]
        lines += _failures(failed)
        lines.append(nearest(backend, known).strip() or install_hint(backend))
        super().__init__("\n".join(lines))


class DuplicateBackendError(TrainableError, ValueError):
    """Raised when two plugins provide backends of the same name."""

    def __init__(self, backend: str, providers: Collection[str]) -> None:
        self.backend, self.providers = backend, list(providers)
        super().__init__(
            f"{len(self.providers)} plugins provide backend {backend!r}: {'; '.join(self.providers)}\n"
            "Hint: uninstall one, or switch a plugin off with TRAINABLE_DISABLE_PLUGINS=name."
        )


class PluginError(TrainableError, TypeError):
    """Raised when an object registered in process is not a plugin."""

    def __init__(self, plugin: str, problem: str) -> None:
        self.plugin, self.problem = plugin, problem
        super().__init__(
            f"plugin {plugin!r} can't be registered: {problem}\n"
            "Hint: a plugin is a module or an object with functions marked @hookimpl: "
            "trainable_register_quantizers, trainable_register_backend."
        )


class QuantizerDefinitionError(TrainableError, TypeError):
    """Raised when a quantizer class is not what the registry needs."""

    def __init__(self, cls: object, problem: str) -> None:
        self.cls, self.problem = cls, problem
        name = getattr(cls, "__qualname__", repr(cls))
        super().__init__(
            f"{name} can't be registered: {problem}\n"
            "Hint: a quantizer carries @mark_quantizer(quantization_target=..., quantization_method=[...], "
            "identifier=...) and takes its config first; every further argument needs a default."
        )


class InvalidArgumentError(TrainableError, ValueError):
    """Raised when an argument is wrong whatever it is used for: of a wrong type, out of range, or unknown."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        self.subject, self.problem = subject, problem
        super().__init__(f"{subject}: {problem}" + (f"\nHint: {hint}" if hint else ""))


class UnsupportedConfigError(TrainableError, ValueError):
    """Raised when a config is well formed but this quantizer, layer or target can't carry it out."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        self.subject, self.problem = subject, problem
        super().__init__(f"{subject}: {problem}" + (f"\nHint: {hint}" if hint else ""))


class ShapeMismatchError(TrainableError, ValueError):
    """Raised when parameters don't fit the tensor they are for."""

    def __init__(self, subject: str, expected: object, got: object, hint: str = "") -> None:
        self.subject, self.expected, self.got = subject, expected, got
        super().__init__(f"{subject}: expected {expected}, got {got}" + (f"\nHint: {hint}" if hint else ""))


class IntegerRangeError(TrainableError, OverflowError):
    """Raised when a bias has codes that int32 does not hold."""

    def __init__(self, subject: str, channel: int, count: int, value: float, scale: float) -> None:
        self.subject, self.channel, self.count = subject, channel, count
        self.value, self.scale = value, scale
        more = f"; so are those of {count - 1} more channels" if count > 1 else ""
        super().__init__(
            f"{subject}: its code of channel {channel} is beyond int32: {value:.6g} in steps of {scale:.6g}{more}\n"
            "Hint: a larger min_threshold of the layer's weights makes the steps larger; a rule with "
            '"bias": "float" leaves the bias in float.'
        )


class QuantizerStateError(TrainableError, RuntimeError):
    """Raised when a call comes at the wrong time: not initialized, not calibrated, already trained."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        self.subject, self.problem = subject, problem
        super().__init__(f"{subject}: {problem}" + (f"\nHint: {hint}" if hint else ""))


class CalibrationError(TrainableError, ValueError):
    """Raised when the values seen can't give quantization parameters."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        self.subject, self.problem = subject, problem
        super().__init__(f"{subject}: {problem}" + (f"\nHint: {hint}" if hint else ""))


class UnseenTensorsError(CalibrationError):
    """Raised when calibration saw no values of tensors that are to be quantized; names all of them at once."""

    def __init__(self, reasons: Mapping[str, str], ways_out: Collection[str]) -> None:
        self.reasons, self.ways_out = dict(reasons), list(ways_out)
        lines = [f"no values were seen of {len(reasons)} tensor{'s' if len(reasons) != 1 else ''}:"]
        lines += [f"  {subject}: {reason}" for subject, reason in reasons.items()]
        hints = "".join(f"\n  - {way}" for way in ways_out)
        super().__init__("calibrate", "\n".join(lines), f"each of these is a way out:{hints}")


class RuleError(TrainableError, ValueError):
    """Raised when a recipe's rule matches no layer, or asks for what its layers don't have."""

    def __init__(self, rule: str, problem: str, layers: Collection[str]) -> None:
        self.rule, self.problem, self.layers = rule, problem, list(layers)
        super().__init__(f"{rule}: {problem}\nlayers: {', '.join(layers) or 'none'}")


class ModelError(TrainableError, TypeError):
    """Raised when a model is not of the kind the verb needs."""

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem = problem
        super().__init__(problem + (f"\nHint: {hint}" if hint else ""))


class FrameworkError(TrainableError, ImportError):
    """Raised when a backend's framework is missing, or another generation of it is in the process."""

    def __init__(self, backend: str, problem: str, hint: str) -> None:
        self.backend, self.problem, self.hint = backend, problem, hint
        super().__init__(f"backend {backend!r}: {problem}\nHint: {hint}")


class MissingLibraryError(TrainableError, ImportError):
    """Raised when a library that a target needs is not installed, or can't be imported."""

    def __init__(self, library: str, purpose: str, problem: str, install: str) -> None:
        self.library, self.purpose, self.problem, self.install = library, purpose, problem, install
        super().__init__(f"{purpose} needs {library}, which can't be imported: {problem}\nHint: {install}")


class DocumentError(TrainableError, ValueError):
    """Raised when a saved file is truncated, foreign, damaged, or does not fit the model."""

    def __init__(self, path: object, problem: str, hint: str = "") -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path}: {problem}" + (f"\nHint: {hint}" if hint else ""))


class DocumentVersionError(DocumentError):
    """Raised when a document was written in a version of the format that this release can't read."""

    def __init__(self, path: object, found: object, supported: Collection[int]) -> None:
        self.found, self.supported = found, list(supported)
        super().__init__(
            path,
            f"schema version {found!r} is not one of {sorted(supported)}",
            "install the release of trainable-core that wrote the document, or write it again.",
        )


class TrainableWarning(UserWarning):
    """Base of everything the library warns of."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle message and facts, as errors do."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class NothingQuantizedWarning(TrainableWarning):
    """Issued when `wrap` returns a model in which no tensor is quantized."""

    def __init__(self, model: str, reasons: Mapping[str, Collection[str]]) -> None:
        self.model, self.reasons = model, {reason: list(names) for reason, names in reasons.items()}
        lines = [f"{model}: nothing is quantized. " + ("Looked at:" if reasons else "It has no layers to look at.")]
        lines += [f"  {_listed(names)}: {reason}" for reason, names in self.reasons.items()]
        lines.append("Hint: describe(qmodel) tells what was left out; register_layer declares layer types of your own.")
        super().__init__("\n".join(lines))


class ThresholdsKeptWarning(TrainableWarning):
    """Issued when a forced calibration saw nothing of tensors that are calibrated already."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = ["thresholds of tensors that were not seen stay as they were:"]
        super().__init__("\n".join([*lines, *(f"  {subject}: {reason}" for subject, reason in reasons.items())]))


class GradientMissingWarning(TrainableWarning):
    """Issued by `track` when thresholds that should learn get no gradient."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        hint = "is the layer a part of the loss? Does the optimizer have parameter_groups(qmodel)? Is a ReLU dead?"
        super().__init__(_told("thresholds that should learn get no gradient:", self.reasons, hint))


class ThresholdCollapsedWarning(TrainableWarning):
    """Issued by `track` when thresholds have shrunk to next to nothing, or are not finite."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        hint = "a smaller learning rate for the group of qparams, as in parameter_groups(qmodel, qparams={'lr': 1e-4})."
        super().__init__(_told("thresholds have collapsed:", self.reasons, hint))


class StatisticsRunAwayWarning(TrainableWarning):
    """Issued by `track` when statistics of batch norms, or the values of activations, grow beyond all measure."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        hint = "a smaller learning rate, or batch norms that are folded after training (fold_batch_norm: after)."
        super().__init__(_told("statistics run away:", self.reasons, hint))


class RecordsLostWarning(TrainableWarning):
    """Issued by `track` when what it found can't be written, or was removed; the training goes on."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        hint = "is the disk full, or the folder gone? Records are tried again each time."
        super().__init__(_told("records of the training are lost:", self.reasons, hint))


LISTED = 10
"""How many names a message lists of one reason."""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _told(heading: str, reasons: Mapping[str, str], hint: str) -> str:
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:LISTED]]
    more = [f"  and {len(reasons) - LISTED} more"] if len(reasons) > LISTED else []
    return "\n".join([heading, *lines, *more, f"Hint: {hint}"])
