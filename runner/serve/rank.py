"""The life of a rank of a server: rank 0 meets the clients, the others follow its steps."""

import signal
import sys
from functools import partial

from parallel.launch import RankEnv, first_signal_calls
from runner.engine.rank import run_rank
from runner.engine.request_maker import RequestMaker
from runner.planning import DecoderJob
from runner.serve.app import make_app, model_name
from runner.serve.front import ServeFront
from runner.serve.http_server import listen, serving
from runner.serve.metrics import Metrics


def serve_rank(job: DecoderJob, env: RankEnv) -> None:
    """Run this process's rank until rank 0 is told to end.

    Raises:
        ConfigError: the address or the key's file cannot be used.
        ShardlineError: see `run_rank`.
    """
    if env.rank != 0:
        if env.report_fd is None:
            # torchrun signals every rank; rank 0 tells the others when to leave.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        run_rank(job, env, None)
        return
    config, scheduler = job.config.server, job.config.scheduler
    maker, metrics = RequestMaker(job), Metrics()
    front = ServeFront(
        maker,
        metrics,
        max_queue_size=scheduler.max_queue_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=job.plan.max_model_len,
        request_timeout_s=config.request_timeout_s,
    )
    app = make_app(job, front, maker, metrics)
    listener = listen(config.host, config.port)
    drain = partial(front.drain, config.shutdown_timeout_s)
    with serving(app, listener), first_signal_calls(drain):
        host, port = listener.getsockname()[:2]
        print(
            f"shardline: serving {model_name(job)} at http://{host}:{port}",
            file=sys.stderr,
            flush=True,
        )
        try:
            run_rank(job, env, front)
        except BaseException as error:
            front.fail(f"the engine has ended: {error}")
            raise


def check_server(job: DecoderJob) -> None:
    """Find out before there are ranks whether the server can be what it is asked to be.

    Raises:
        ConfigError: the address or the key's file cannot be used.
        IntegrityError: a file of the tokenizer is absent or corrupt.
    """
    from runner.serve.guard import read_key

    read_key(job.config.server.api_key_file)
    RequestMaker(job)
    listen(job.config.server.host, job.config.server.port).close()
