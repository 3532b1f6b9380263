"""Keep the libraries' progress bars, advice and start-up notices out of the user's terminal."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the libraries say nothing; what they raise comes through as ever."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
