"""Errors a user can mend: each message names the thing, its value and the fix, in one line."""


class SeddScaleError(Exception):
    """Base of every error that is the input's fault and not the program's."""

    exit_code = 2
    """Exit code of a command that ends with this error."""


class ConfigError(SeddScaleError):
    """A configuration key, value or combination of values that cannot be run."""


class DataError(SeddScaleError):
    """Text, a tokenizer or a prepared dataset that is missing, damaged or does not fit."""


class CheckpointError(SeddScaleError):
    """A checkpoint that is missing, damaged, incomplete or of another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what was written: an older one may do in its place."""


class TrainingError(SeddScaleError):
    """A run that cannot continue, such as one whose loss is no longer finite."""


class InstallationError(SeddScaleError, ImportError):
    """A package of a release that this program cannot work with."""


class LostRankError(SeddScaleError):
    """Another process of the job ended or cannot be reached, so that this one cannot continue."""

    exit_code = 76
