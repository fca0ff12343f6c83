"""The two sizes that a plan needs of the data, before or after it is prepared."""

from sedd_scale.config import Config
from sedd_scale.errors import ConfigError


def sizes_for_plan(
    config: Config, *, vocab_size: int | None = None, block_length: int | None = None
) -> tuple[int, int]:
    """N and L: as given, as configured, or as the dataset has them.

    Raises:
        ConfigError: they are nowhere to be found.
    """
    vocab_size = config.model.vocab_size if vocab_size is None else vocab_size
    block_length = config.data.block_length if block_length is None else block_length
    if vocab_size is None or block_length is None:
        from sedd_scale.data.corpus import Corpus, locations_of
        from sedd_scale.data.shards import has_index

        named = config.data.path is not None or config.data.mixture is not None
        absent = (
            [path for path in locations_of(config.data) if not has_index(path)] if named else []
        )
        if absent or not named:
            options = {"--vocab-size N": vocab_size, "--block-length L": block_length}
            missing = " and ".join(name for name, size in options.items() if size is None)
            raise ConfigError(
                f"there is no dataset at data.path={', '.join(absent) or 'null'} to take sizes "
                f"from: give {missing} (GPT-2's vocabulary has 50257 tokens, the paper's blocks "
                "1024)"
            )
        corpus = Corpus(config.data)
        vocab_size = corpus.vocab_size if vocab_size is None else vocab_size
        block_length = corpus.block_length if block_length is None else block_length
    return vocab_size, block_length
