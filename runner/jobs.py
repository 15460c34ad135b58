"""The job for whatever kind of model a configuration names."""

from runner.config.schema import RunnerConfig
from runner.job import Job


def prepare(config: RunnerConfig) -> Job:
    """Read the model and divide it.

    Raises:
        ConfigError: the model, a size or a cut is not possible.
        IntegrityError: a file of the model is absent, truncated, corrupt or does not match.
    """
    if config.model.kind == "graph":
        from runner.graph_planning import GraphJob

        return GraphJob.prepare(config)
    from runner.planning import DecoderJob

    return DecoderJob.prepare(config)
