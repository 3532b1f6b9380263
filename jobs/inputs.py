"""What a sweep needs to be there, looked at before anything is written, started or downloaded."""

from orchestrator.config import SweepConfig
from orchestrator.data.sources import estimate_slices
from orchestrator.data_config import DataConfig
from orchestrator.errors import BaseModelError, ConfigError, DataError, TrackingUnreachable
from orchestrator.planning.shape import UnknownShape, read_shape
from orchestrator.search.space import check_space
from orchestrator.sweep.bits import check_hqq
from orchestrator.sweep.flow import check_layers
from orchestrator.tracking.stores import check_reachable, resolve_tracking_uri
from orchestrator.training.model_source import find_source, folder_here


def check_inputs(config: SweepConfig) -> None:
    """Find all that is wrong before anything is written, started or downloaded."""
    check_space(config)
    check_hqq(config)
    check_files(config)
    check_tracking(config)


def check_files(config: SweepConfig) -> None:
    """Raises BaseModelError or DataError for what is not there, ConfigError if both are not, or for
    layers that a base which is here does not have."""
    try:
        find_source(config.base_model)
    except BaseModelError as mistake:
        try:
            check_sources(config.data)
        except DataError as second:
            raise ConfigError(f"{mistake}\n{second}") from mistake
        raise
    check_sources(config.data)
    if (folder := folder_here(config.base_model)) is not None:
        shape = read_shape(folder)
        if not isinstance(shape, UnknownShape):
            check_layers(config, shape)


def check_tracking(config: SweepConfig) -> None:
    """A server that is down may come back while trials train; anything else is refused now."""
    try:
        check_reachable(resolve_tracking_uri(config))
    except TrackingUnreachable as error:
        print(f"warning: {error}; training does not wait for it: the run folder keeps everything")


def check_sources(data: DataConfig) -> None:
    """Raises DataError for a source that is not there, as far as that is cheap to tell."""
    for source in (*data.train_sources, *data.held_out_sources):
        estimate_slices(source, data.slice_bytes)
