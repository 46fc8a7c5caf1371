"""Serve MiniGPT-4 through an OpenAI-compatible API; see docs/serve.md.

The checkpoint that the quickstart made, on a CPU:
    python serve.py --cfg-path eval_configs/mini_eval.yaml
Several checkpoints on one GPU, reachable from the network (set the key as MINIGPT4_API_KEY):
    python serve.py --cfg-path eval_configs/minigpt4_eval.yaml --ckpt epoch4=RUN/checkpoint_4.pth --host 0.0.0.0
"""

import argparse
import logging
import signal

from minigpt4.common.binding import bind, require_paths
from minigpt4.common.config import Config
from minigpt4.common.config_files import parse_options
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import end, exit_status, quick_imports, require_packages
from minigpt4.serving.address import address_of, is_local, listen

log = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file with the model")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    parser.add_argument("--ckpt", nargs="*", default=[], metavar="NAME=FILE", help="more checkpoints of the model")
    parser.add_argument("--gpu-id", type=int, default=0, help="GPU to use, where there is one (0)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (8000)")
    parser.add_argument("--max-rows", type=int, default=8, help="answers generated at once (8)")
    parser.add_argument("--limits", nargs="*", default=[], metavar="NAME=VALUE", help="override limits")
    return parser.parse_args(argv)


def serve(args: argparse.Namespace) -> None:
    """Load, listen, and answer until a signal comes."""
    require_packages("the server", "serve", "fastapi", "uvicorn")
    with quick_imports():
        from minigpt4.serving.api.access import Access, ApiLimits
        from minigpt4.serving.api.app import KEY_VARIABLE, api_key, build_app, make_server
        from minigpt4.serving.loading import load_engine

    if args.max_rows < 1:
        raise ConfigError(f"--max-rows: {args.max_rows} must be above 0")
    limits = bind(ApiLimits, parse_options(args.limits), section="limits", source="--limits")
    key = api_key()
    config = Config(args).validate(training=False)
    require_paths({"model": config.model}, config.source)
    with listen(args.host, args.port) as bound:
        if key is None and not is_local(bound):
            log.warning("Whoever reaches %s may use this server: set %s", address_of(bound), KEY_VARIABLE)
        settings = {"max_rows": args.max_rows, "max_waiting": limits.waiting}
        with load_engine(config, args.ckpt, args.gpu_id, **settings) as engine:
            app = build_app(engine, limits, Access(key, is_local(bound)))
            log.info("Listening on %s; models: %s", address_of(bound), ", ".join(engine.checkpoints))
            make_server(app, limits).run(sockets=[bound])
    log.info("Ended")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after a signal, 2 for an error that the user can fix."""
    args = parse_args(argv)
    setup_logging(rank=0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end in the same way, while the model loads too
    try:
        return exit_status(lambda: serve(args))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    end(main())
